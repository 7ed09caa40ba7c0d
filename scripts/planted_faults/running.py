"""Faults of runs: checkpoints, steps that are not finite, recipes, LoRA."""

from .fault import Fault

CHECKPOINTS = "tests/training/test_checkpoints.py"
RESUME = "tests/training/test_resume.py"
TRAINER = "tests/training/test_trainer.py"
NONFINITE = "tests/training/test_nonfinite.py"
RECIPE = "tests/training/test_recipe.py"
RUN = "tests/training/test_run.py"
LORA = "tests/training/test_lora.py"
QLORA = "tests/training/test_qlora.py"

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
    # recipes
    Fault(
        "unknown fields of a recipe are read past",
        "training/reading.py",
        "    for name in values:\n        if name not in known:\n",
        "    values = {name: value for name, value in values.items() if name in known}\n"
        "    for name in values:\n        if name not in known:\n",
        (RECIPE, "-k", "wrong_field"),
    ),
    Fault(
        "overrides are text",
        "training/reading.py",
        'return _convert(_from_text(value, hint), hint, where, ".".join(keys))',
        "return value",
        (RECIPE, "-k", "type_of_its_field"),
    ),
    Fault(
        "a number is taken for true",
        "training/reading.py",
        "return arm in _NAMES and type(value) is arm",
        "return arm in _NAMES and isinstance(value, arm)",
        (RECIPE, "-k", "wrong_field or wrong_override"),
    ),
    Fault(
        "the last of two equal fields counts",
        "training/reading.py",
        "if double is not None:",
        "if False:",
        (RECIPE, "-k", "stands_twice"),
    ),
    Fault(
        "an override reaches the first stage only",
        "training/recipe.py",
        "    for stage in chosen:\n",
        "    for stage in chosen[:1]:\n",
        (RECIPE, "-k", "every_stage"),
    ),
    Fault(
        "a batch that does not divide is rounded down",
        "training/sections.py",
        "if training.batch_size % at_once:",
        "if training.batch_size < at_once:",
        (RECIPE, "-k", "does_not_divide"),
    ),
    Fault(
        "every stage starts from the first one's weights",
        "training/run.py",
        "            stage = starting_from(stage, folder)\n",
        "            stage = replace(stage, model=recipe.stages[0].model)\n",
        (RUN, "-k", "hands_its_model_on"),
    ),
    Fault(
        "a run goes on with other fields",
        "training/run.py",
        "    if changed:\n",
        "    if False:\n",
        (RUN, "-k", "other_fields"),
    ),
    Fault(
        "the cache of a run is not compared with its teacher",
        "training/run.py",
        "        cache.check(None if teacher is None else teacher.spec, pixels.patch_size)\n",
        "",
        (RUN, "-k", "cache_of_another"),
    ),
    Fault(
        "what is frozen trains",
        "training/building.py",
        "        parameter.requires_grad_(id(parameter) in trained)\n",
        "        parameter.requires_grad_(True)\n",
        (RUN, "-k", "named_parts"),
    ),
    Fault(
        "merging of a stage is not set",
        "training/run.py",
        "    model = build_model(stage, processor, ",
        "    model = build_model(replace(stage, model=replace(stage.model, merge_schedule=None)), processor, ",
        (RUN, "-k", "hands_its_model_on"),
    ),
    # LoRA
    Fault(
        "LoRA leaves the patch embedding frozen",
        "training/lora.py",
        'default_factory=lambda: ["patch_embed"]',
        "default_factory=list",
        (LORA, "-k", "gradients_reach"),
    ),
    Fault(
        "an adapter lacks the task heads",
        "training/lora.py",
        '        saved.append("guidance")\n',
        "        pass\n",
        (LORA, "-k", "gradients_reach or guided_adapter"),
    ),
    Fault(
        "LoRA acts on the patch embedding too",
        "peft_elva.py",
        r"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        r".*\.\w+_proj",
        (LORA, "-k", "default_targets"),
    ),
    Fault(
        "new words do not train the head that is not tied",
        "training/lora.py",
        '["embed_tokens"] if tied else ["embed_tokens", "lm_head"]',
        '["embed_tokens"]',
        (LORA, "-k", "new_words_train"),
    ),
    Fault(
        "QLoRA quantises the patch embedding",
        "training/lora.py",
        r"""(r"(model\.)?patch_embed", "guidance", "lm_head")""",
        """("patch_embed", "guidance", "lm_head")""",
        (QLORA,),
    ),
)
