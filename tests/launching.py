"""Launches of `elva train` as `accelerate launch` makes them, on CPU with gloo: its own reading of a configuration."""

import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


def launch_environment(config, processes=2):
    """Environment that `accelerate launch` gives its processes for a configuration file."""
    line = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*line, "-m", "elva_hf.cli"]))
    return prepare_multi_gpu_env(args)


def launch(config, *arguments, processes=2, timeout=300):
    """Run `elva train` in several processes on the CPU; returns what they printed, fails if one of them does."""
    environment = {
        **launch_environment(config, processes),
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun, str(Path(__file__).with_name("elva_on_cpus.py")), "train", *map(str, arguments)]
    environment = {key: value for key, value in environment.items() if not key.startswith(("MASTER_", "RANK"))}
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout
