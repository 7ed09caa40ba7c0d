"""The benchmark of the merge kernels runs whole at its smallest size, and its table is made from its numbers."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import measuring
        import merge_kernels

        for module in (merge_kernels, measuring):
            patch.setattr(module, "run_in_fresh_process", lambda function, *args: function(*args))
        yield merge_kernels


def run_script(script, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        argv = ["benchmarks/merge_kernels.py", "--size", "tiny", "--rounds", "2", "--calls", "1", *options]
        patch.setattr(sys, "argv", [*argv, "--out", str(folder)])
        script.main()
    name = "merge-kernels-cuda" if "cuda" in options else "merge-kernels-cpu"
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


@NEEDS_PROC
def test_a_cpu_measures_the_reference_alone(script, tmp_path):
    result, markdown = run_script(script, tmp_path)
    assert result["kind"] == "measured" and result["agreement"] is None
    assert [(row["part"], row["implementation"]) for row in result["rows"]] == [
        (part, "reference") for part in ("similarity", "means", "step", "copy")
    ]
    assert all(row["seconds"]["min"] > 0 and row["seconds_ratio"] == 1 for row in result["rows"])
    assert script.as_markdown(result) == markdown


@pytest.mark.gpu
def test_a_gpu_measures_both_in_one_run(script, tmp_path):
    result, markdown = run_script(script, tmp_path, "--device", "cuda")
    assert [row["implementation"] for row in result["rows"]] == 3 * ["reference", "kernels"] + ["reference"]
    assert result["agreement"]["largest_similarity_difference"] < 1e-5
    assert script.as_markdown(result) == markdown


def test_the_row_has_the_tokens_of_table_5_and_merges_half_of_its_links(script):
    frames, _ = script.SIZES["table5"]
    tokens = script.Tokens.make(script.Setting("cpu", "float32", frames, 4, 1, 1))
    assert len(tokens.tubes) == 20112 and int(tokens.links.has_next.sum()) == 127 * 144
    assert tokens.num_kept == 20112 - 127 * 144 // 2 == int((tokens.survivors.unique()).numel())
    assert script.step(tokens).shape == script.means(tokens).shape == (tokens.num_kept, 4)


def test_ratios_are_to_the_reference_of_the_same_round(script):
    def runs(*seconds):
        return [{"seconds": value, "peak_bytes": None} for value in seconds]

    figures = [(("means", "reference"), runs(2.0, 8.0)), (("means", "kernels"), runs(1.0, 2.0))]
    setting = script.Setting("cuda", "bfloat16", 2, 4, 2, 10)
    rows = script.rows_of(setting, {"figures": figures})
    assert [row["seconds_ratio"] for row in rows] == [1, 0.375]
    assert rows[1]["seconds"]["median"] == pytest.approx(0.15) and rows[1]["peak_bytes"] is None
