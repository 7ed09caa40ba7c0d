"""Faults of checkpoints and of steps that are not finite."""

from .fault import Fault

TRAINER = "tests/training/test_trainer.py"
CHECKPOINTS = "tests/training/test_checkpoints.py"
RESUME = "tests/training/test_resume.py"
NONFINITE = "tests/training/test_nonfinite.py"

RUNNING = (
    # checkpoints
    Fault(
        "a half-written checkpoint is resumed from",
        "training/checkpoints.py",
        "        fault = checkpoint_fault(path)\n",
        "        fault = None\n",
        (CHECKPOINTS, "-k", "damaged_checkpoint"),
    ),
    Fault(
        "a changed file of a checkpoint is not noticed",
        "training/checkpoints.py",
        "if sha256 is not None and _sha256(path) != sha256:",
        "if False:",
        (CHECKPOINTS, "-k", "damaged_checkpoint"),
    ),
    Fault(
        "a checkpoint gets its name before it is on disk",
        "training/checkpoints.py",
        "                seal_checkpoint(partial, hashes=self.checkpoint_hashes)\n"
        "                _publish(partial, final)\n",
        "                _publish(partial, final)\n"
        "                seal_checkpoint(final, hashes=self.checkpoint_hashes)\n",
        (CHECKPOINTS, "-k", "before_the_one_rename"),
    ),
    Fault(
        "files are not synced",
        "training/checkpoints.py",
        "        _sync(path)\n        size = path.stat().st_size\n",
        "        size = path.stat().st_size\n",
        (CHECKPOINTS, "-k", "before_the_one_rename"),
    ),
    Fault(
        "the old checkpoint is deleted before the new one is whole",
        "training/checkpoints.py",
        "                _prepare(run, self._bytes_needed(run))\n",
        "                _prepare(run, self._bytes_needed(run))\n"
        "                _rotate(run, self.args.save_total_limit and 1, set())\n"
        "                [shutil.rmtree(path) for path in _checkpoints(run) if self.args.save_total_limit == 1]\n",
        (CHECKPOINTS, "-k", "rotation or write_that_fails"),
    ),
    Fault(
        "half-written checkpoints count for save_total_limit",
        "training/checkpoints.py",
        "return [path for path in _checkpoints(run) if checkpoint_fault(path, hashes=False) is None]",
        "return _checkpoints(run)",
        (CHECKPOINTS, "-k", "rotation"),
    ),
    Fault(
        "the best checkpoint is deleted",
        "training/checkpoints.py",
        "{final, Path(self.state.best_model_checkpoint or final)}",
        "{final}",
        (CHECKPOINTS, "-k", "best_model"),
    ),
    Fault(
        "what a failed save wrote stays",
        "training/checkpoints.py",
        "            shutil.rmtree(run / PARTIAL, ignore_errors=True)\n",
        "            pass\n",
        (CHECKPOINTS, "-k", "write_that_fails"),
    ),
    Fault(
        "no look for room before writing",
        "training/checkpoints.py",
        "if _free_bytes(run) < _with_margin(size):",
        "if False:",
        (CHECKPOINTS, "-k", "room_is_looked_for"),
    ),
    Fault(
        "random numbers start anew after a resume",
        "training/trainer.py",
        "        super()._load_rng_state(checkpoint)\n",
        "",
        (TRAINER, "-k", "resumed_run"),
    ),
    Fault(
        "components of the window before a resume are forgotten",
        "training/trainer.py",
        '            self.guidance_hook.load_state_dict(json.loads(path.read_text(encoding="utf-8")))\n',
        "            pass\n",
        (TRAINER, "-k", "resumed_run"),
    ),
    Fault(
        "the loss since the last line of the log is forgotten",
        "training/checkpoints.py",
        'self._tr_loss += self._resumed_loss["loss"]',
        'self._tr_loss += 0 * self._resumed_loss["loss"]',
        (RESUME, "-k", "stopped and log"),
    ),
    # steps that are not finite
    Fault(
        "a step of NaN is taken",
        "training/nonfinite.py",
        "            parameter.grad = None  # optimizers leave such parameters and their state alone\n",
        "            pass\n",
        (NONFINITE, "-k", "changes_nothing and adamw"),
    ),
    Fault(
        "a step of NaN is taken as one of zeros",
        "training/nonfinite.py",
        "            parameter.grad = None  # optimizers leave such parameters and their state alone\n",
        "            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter)\n",
        (NONFINITE, "-k", "changes_nothing and adamw"),
    ),
    Fault(
        "skipped steps are not counted",
        "training/nonfinite.py",
        "        self.skipped_steps += 1\n",
        "",
        (NONFINITE, "-k", "record_names or logged"),
    ),
    Fault(
        "skipped steps far apart stop a run",
        "training/nonfinite.py",
        "        if reason is None:\n            self.consecutive = 0\n",
        "        if reason is None:\n",
        (NONFINITE, "-k", "spoiled_step"),
    ),
    Fault(
        "the norm that looks for NaN overflows itself",
        "training/nonfinite.py",
        "norm_type=math.inf)",
        "norm_type=2.0)",
        (NONFINITE, "-k", "does_not_overflow"),
    ),
    Fault(
        "a process skips alone",
        "training/nonfinite.py",
        "            distributed.all_reduce(found, distributed.ReduceOp.MAX)\n",
        "            pass\n",
        (RESUME, "-k", "skipped_on_all"),
    ),
    Fault(
        "callbacks made anew by a resume know no trainer",
        "training/trainer.py",
        "        self._introduce()  # to new instances\n",
        "",
        (TRAINER, "-k", "makes_anew"),
    ),
    Fault(
        "callbacks added since a checkpoint break the next save",
        "training/checkpoints.py",
        "        self._keep_callback_states()\n",
        "",
        (CHECKPOINTS, "-k", "callbacks_keep"),
    ),
    Fault(
        "the final mean of a resumed run counts the loss before it",
        "training/checkpoints.py",
        'self._total_loss_scalar -= self._resumed_loss["loss"]',
        "pass",
        (CHECKPOINTS, "-k", "final_mean"),
    ),
    Fault(
        "a checkpoint caught between two renames is lost",
        "training/checkpoints.py",
        "    folder = Path(folder)\n    _put_back_replaced(folder)\n",
        "    folder = Path(folder)\n",
        (CHECKPOINTS, "-k", "replaced_or_kept"),
    ),
    Fault(
        "a checkpoint of the same step is deleted before it is replaced",
        "training/checkpoints.py",
        'os.rename(final, partial.with_name(f"replaced-{final.name}"))',
        "shutil.rmtree(final)",
        (CHECKPOINTS, "-k", "replaced_or_kept"),
    ),
    Fault(
        "the name of a checkpoint is not synced",
        "training/checkpoints.py",
        "    os.rename(partial, final)\n    _sync(final.parent)\n",
        "    os.rename(partial, final)\n",
        (CHECKPOINTS, "-k", "before_the_one"),
    ),
    Fault(
        "a cut file without a hash is not noticed",
        "training/checkpoints.py",
        "    if found != size:\n",
        "    if False:\n",
        (CHECKPOINTS, "-k", "cut_file"),
    ),
    Fault(
        "a full disk met by torch is not told",
        "training/checkpoints.py",
        "any(part in str(error) for part in _STORAGE_MESSAGES)",
        "False",
        (CHECKPOINTS, "-k", "write_that_fails"),
    ),
    Fault(
        "one skipped step too many in a row",
        "training/nonfinite.py",
        "if self.consecutive >= self.max_consecutive:",
        "if self.consecutive > self.max_consecutive:",
        (NONFINITE, "-k", "so_many"),
    ),
    Fault(
        "counts of skipped steps start anew after a resume",
        "training/nonfinite.py",
        'counts = kept["attributes"] if kept else {}',
        "counts = {}",
        (NONFINITE, "-k", "survive"),
    ),
    Fault(
        "a step that clipping made zero is taken",
        "training/nonfinite.py",
        "if found == ZERO and args.max_grad_norm > 0 and not self._norm_is_finite():",
        "if False:",
        (NONFINITE, "-k", "spoiled_step"),
    ),
    Fault(
        "NaN stays in the log for good",
        "training/nonfinite.py",
        "            self._trainer._tr_loss.zero_()",
        "            pass",
        (NONFINITE, "-k", "logged"),
    ),
)
