import json
import subprocess
import sys
import textwrap
from importlib import resources
from pathlib import Path

import pytest
import yaml

import elva_hf
from elva_hf.errors_elva import CheckpointError
from elva_hf.hub import AUTO_MAP, ENTRY_POINTS, export_hub_files, render_card

ROOT = Path(__file__).parents[2]
CARD = {
    "license": "apache-2.0",
    "title": "T",
    "summary": "S",
    "model_id": '"org/elva-7b"',
    "architecture": "A",
    "limits": "L",
    "training": "T",
    "evaluation": "E",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    tiny = elva_hf.tiny_checkpoint()
    elva_hf.ElvaForCausalLM.from_pretrained(tiny).save_pretrained(path)
    elva_hf.ElvaProcessor.from_pretrained(tiny).save_pretrained(path)
    export_hub_files(path, CARD)
    return path


def run(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", [*ENTRY_POINTS, "model_card.md"])
def test_the_package_ships_the_root_files(name):
    assert (resources.files("elva_hf.hub") / name).read_text() == (ROOT / name).read_text()


def test_every_head_loads_in_a_process_that_did_not_import_the_package(folder):
    result = run(f"""
        import sys, transformers
        from transformers import AutoConfig, AutoProcessor
        folder = {str(folder)!r}
        for head in {[name for name in AUTO_MAP if name.startswith("AutoModel")]!r}:
            model = getattr(transformers, head).from_pretrained(folder, trust_remote_code=True)
            print(head, type(model).__module__, type(model).__name__)
        print(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__)
        print(type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__module__)
    """)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("elva_hf.modeling_elva ElvaForCausalLM") == 3
    assert "AutoModel elva_hf.modeling_elva ElvaModel" in result.stdout
    assert "elva_hf.configuration_elva" in result.stdout and "elva_hf.processing_elva" in result.stdout


@pytest.mark.parametrize("head", ["AutoConfig", "AutoModelForCausalLM", "AutoProcessor"])
def test_without_the_package_the_reader_is_told_its_name(folder, head):
    result = run(f"""
        import sys
        sys.modules["elva_hf"] = None
        import transformers
        transformers.{head}.from_pretrained({str(folder)!r}, trust_remote_code=True)
    """)
    assert result.returncode != 0
    assert "elva_hf" in result.stderr.splitlines()[-1] + result.stderr.splitlines()[-2]


def test_the_card_has_valid_hub_metadata(folder):
    front = (folder / "README.md").read_text().split("---")[1]
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "video-text-to-text"


def test_a_card_with_a_missing_field_names_it():
    with pytest.raises(CheckpointError, match="'summary'"):
        render_card({name: value for name, value in CARD.items() if name != "summary"})


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export_hub_files(tmp_path)


def test_auto_map_of_the_processor_is_written(folder):
    fields = json.loads((folder / "processor_config.json").read_text())
    assert fields["auto_map"]["AutoProcessor"].startswith("processing_elva.")
    assert fields["video_processor"]["auto_map"]["AutoVideoProcessor"].startswith("processing_elva.")
