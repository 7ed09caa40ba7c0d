"""Faults of the losses, their guidance, the teacher and its cache."""

from .fault import Fault

LOSSES = "tests/training/test_losses.py"
GATHERING = "tests/training/test_gathering.py"
GUIDANCE = "tests/training/test_guidance.py"
TRAINER = "tests/training/test_trainer.py"
RANKS = "tests/training/test_distributed.py"
TEACHER = "tests/training/test_teacher.py"
CACHE = "tests/training/test_teacher_cache.py"
HEADS = "tests/test_guidance_elva.py"

_OVER_RANKS = """        all_student = gather_rows(own_student, counts, group)
        all_teacher = gather_rows(own_teacher, counts, group)
"""

GUIDING = (
    # losses
    Fault(
        "L_MSE is a sum over videos",
        "training/losses.py",
        "return errors.sum() / (len(errors) if num_videos is None else num_videos)",
        "return errors.sum()",
        (LOSSES, "-k", "add_up or weighs_the_same"),
    ),
    Fault(
        "L_MSE is a sum over the places of a video",
        "training/losses.py",
        "return errors / places.to(errors.device)",
        "return errors",
        (LOSSES, "-k", "equals_a_loop"),
    ),
    Fault(
        "L_MSE is a mean over features",
        "training/losses.py",
        "(_normalise(student) - _normalise(teacher)).square().sum(-1)",
        "(_normalise(student) - _normalise(teacher)).square().mean(-1)",
        (LOSSES, "-k", "carry_no_weight"),
    ),
    Fault(
        "the last frame of a tube for its mean",
        "training/losses.py",
        ".index_add(0, places, _full(features))",
        ".index_copy(0, places, _full(features))",
        (LOSSES, "-k", "equals_a_loop"),
    ),
    Fault(
        "places are pooled after they are normalised",
        "training/losses.py",
        "_pool(student, rows, columns), ",
        "_pool(_normalise(student), rows, columns), ",
        (LOSSES, "-k", "averaged_before_pooling"),
    ),
    Fault(
        "clips of one grid are one clip in all videos",
        "training/losses.py",
        "kinds = torch.stack([video, geometry.frame_rows, geometry.frame_columns])",
        "kinds = torch.stack([0 * video, geometry.frame_rows, geometry.frame_columns])",
        (LOSSES, "-k", "different_clips"),
    ),
    Fault(
        "L_Con in one direction",
        "training/losses.py",
        'F.cross_entropy(to_student, pairs, reduction="sum")',
        'F.cross_entropy(to_teacher, pairs, reduction="sum")',
        (LOSSES, "-k", "double_loop"),
    ),
    Fault(
        "cosines are divided by tau",
        "training/losses.py",
        "to_student = logit_scale * (own_teacher @ all_student.T)",
        "to_student = (own_teacher @ all_student.T) / logit_scale",
        (LOSSES, "-k", "double_loop"),
    ),
    Fault(
        "a frame is masked from its own pair",
        "training/losses.py",
        "same[own, sum(counts[:rank]) + own] = False",
        "same[own, own] = False",
        (GATHERING, "-k", "mean_over_ranks"),
    ),
    Fault(
        "labels of the token itself, not of the next",
        "training/losses.py",
        "F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()",
        "labels.flatten()",
        (LOSSES, "-k", "generative"),
    ),
    # over processes
    Fault(
        "negatives of the own process only",
        "training/losses.py",
        _OVER_RANKS,
        "        first, total = 0, len(student) * len(counts)\n"
        "        all_student, all_teacher = own_student, own_teacher\n",
        (GATHERING, "-k", "mean_over_ranks"),
    ),
    Fault(
        "frames gathered without gradient",
        "training/gathering.py",
        "return _GatherRows.apply(rows, counts, group)",
        "return _GatherRows.apply(rows.detach(), counts, group)",
        (GATHERING, "-k", "mean_over_ranks"),
    ),
    Fault(
        "what other processes ask of a row is lost",
        "training/gathering.py",
        "        dist.all_reduce(gradient, group=ctx.group)\n",
        "",
        (GATHERING, "-k", "sum_of_what"),
    ),
    Fault(
        "L_Con of a process is not scaled for the mean that DDP takes",
        "training/losses.py",
        "return loss / 2 * (len(counts) / max(total, 1))",
        "return loss / 2 / max(total, 1)",
        (GATHERING, "-k", "mean_over_ranks"),
    ),
    Fault(
        "videos of the own process are counted for the step",
        "training/trainer.py",
        "return self.accelerator.gather(count).sum() if world_size() > 1 else count",
        "return count",
        (RANKS, "-k", "learn_what_one_does"),
    ),
    # the hook and the trainer
    Fault(
        "L_MSE is a mean of the means of micro-batches",
        "training/trainer.py",
        '                batch["num_videos_in_batch"] = num_videos\n',
        "                pass\n",
        (TRAINER, "-k", "words_and_tubes"),
    ),
    Fault(
        "terms that do not follow what the trainer divides by",
        "training/guidance.py",
        "self._add(output, loss, weighted / multiplier)",
        "self._add(output, loss, weighted)",
        (GUIDANCE, "-k", "accumulates_by_dividing or plain_trainer_averages"),
    ),
    Fault(
        "num_items_in_batch is not noticed",
        "training/guidance.py",
        'is_scaled=kwargs.get("num_items_in_batch") is not None',
        "is_scaled=False",
        (TRAINER, "-k", "words_and_tubes"),
    ),
    Fault(
        "weights of Eq. 4 are not read",
        "training/guidance.py",
        'terms.total(guidance["tube_weight"], guidance["frame_weight"])',
        "terms.total()",
        (GUIDANCE, "-k", "eq_4"),
    ),
    Fault(
        "losses of the teacher in evaluation",
        "training/guidance.py",
        "learns = student.training and (",
        "learns = (",
        (GUIDANCE, "-k", "evaluation_adds_nothing"),
    ),
    Fault(
        "features in half precision under autocast",
        "training/guidance.py",
        "return targets.to(features.device, torch.promote_types(features.dtype, torch.float32))",
        "return targets.to(features)",
        (GUIDANCE, "-k", "half_precision"),
    ),
    Fault(
        "the last, shorter accumulation of an epoch is divided by the usual one",
        "training/trainer.py",
        "self.guidance_hook.accumulation_steps = max(len(batches), 1)",
        "self.guidance_hook.accumulation_steps = self.args.gradient_accumulation_steps",
        (TRAINER, "-k", "shorter_accumulation"),
    ),
    Fault(
        "GradCache draws another dropout in its second pass",
        "training/trainer.py",
        "            set_random_state(self._random_states.pop(0))\n",
        "            self._random_states.pop(0)\n",
        (TRAINER, "-k", "same_dropout"),
    ),
    Fault(
        "GradCache leaves tau without gradient",
        "training/grad_cache.py",
        'common = {"logit_scale_gradient": scale_gradient,',
        'common = {"logit_scale_gradient": 0 * scale_gradient,',
        (TRAINER, "-k", "cached_gradients or (with_grad_cache and split1)"),
    ),
    Fault(
        "GradCache takes videos of several micro-batches for one",
        "training/grad_cache.py",
        "video_ids.append(part.video_ids + number)",
        "video_ids.append(part.video_ids)",
        (TRAINER, "-k", "cached_gradients"),
    ),
    Fault(
        "the logs hold sums of components",
        "training/components.py",
        "means = {name: total / self._steps for name, total in self._sums.items()}",
        "means = dict(self._sums)",
        (GUIDANCE, "-k", "means_over_steps"),
    ),
    Fault(
        "the teacher is part of the model, and so of its checkpoints",
        "training/guidance.py",
        "        if self.hook.teacher is not None:\n            self.hook.teacher.to(args.device)\n",
        "        if self.hook.teacher is not None:\n            model.teacher = self.hook.teacher.module\n",
        (TRAINER, "-k", "never_the_teacher"),
    ),
    # heads
    Fault(
        "tau is not exponentiated",
        "guidance_elva.py",
        "self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)",
        "self.logit_scale.clamp(max=MAX_LOGIT_SCALE)",
        (HEADS, "-k", "tau"),
    ),
    Fault(
        "tau is not clamped",
        "guidance_elva.py",
        "self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)",
        "self.logit_scale.exp()",
        (HEADS, "-k", "tau"),
    ),
    Fault(
        "the heads of the stage before are drawn anew",
        "modeling_elva.py",
        "{k: v for k, v in old.items() if k in new and v.shape == new[k].shape}",
        "{}",
        (HEADS, "-k", "set_changed"),
    ),
    Fault(
        "heads are exported",
        "hub/__init__.py",
        "    written += drop_training_weights(folder)\n",
        "",
        (HEADS, "-k", "an_export_has_no_heads"),
    ),
    Fault(
        "an export still asks for heads",
        "hub/__init__.py",
        ', without=("guidance",)',
        "",
        (HEADS, "-k", "an_export_has_no_heads"),
    ),
    Fault(
        "a batch of text leaves the patch embedding without gradient",
        "modeling_elva.py",
        "return (embeddings.sum() * 0.0).to(inputs_embeds.dtype)",
        "return (embeddings.sum() * 0.0).detach().to(inputs_embeds.dtype)",
        (HEADS, "-k", "batch_of_text"),
    ),
    # the teacher
    Fault(
        "one layer above the penultimate",
        "training/teacher.py",
        "self.tower.num_states + self.spec.layer)",
        "self.tower.num_states + self.spec.layer + 1)",
        (TEACHER, "-k", "equal_a_direct_call and siglip"),
    ),
    Fault(
        "the teacher can be trained",
        "training/towers.py",
        "model=model.requires_grad_(False).eval()",
        "model=model.eval()",
        (TEACHER, "-k", "frozen_in_eval_mode"),
    ),
    Fault(
        "the class token is the first place",
        "training/towers.py",
        "[:, tower.family.num_class_tokens :]",
        "[:, : math.prod(tower.grid)]",
        (TEACHER, "-k", "class_token"),
    ),
    Fault(
        "CLIP is fed the pixels of SigLIP",
        "training/towers.py",
        '"image", CLIP_MEAN, CLIP_STD, num_class_tokens=1',
        '"image", num_class_tokens=1',
        (TEACHER, "-k", "familys_default"),
    ),
    Fault(
        "a checkpoint's own mean and deviation are not read",
        "training/towers.py",
        'mean, std = fields.get("image_mean", family.mean), fields.get("image_std", family.std)',
        "mean, std = family.mean, family.std",
        (TEACHER, "-k", "mean_deviation_and_scale"),
    ),
    Fault(
        "pixels from 0 to 255 for a tower that wants them from 0 to 1",
        "training/towers.py",
        "values = _unit_range(torch.stack([frames[number] for number in chosen]))",
        "values = torch.stack([frames[number] for number in chosen]).float()",
        (TEACHER, "-k", "equal_a_direct_call or floats_and_bytes"),
    ),
    Fault(
        "frames of the teacher in another order than the student's",
        "training/teacher.py",
        "videos.setdefault(video, []).append(frame)",
        "videos.setdefault(video, []).insert(0, frame)",
        (TEACHER, "-k", "sees_the_flips or come_back"),
    ),
    Fault(
        "the teacher sees frames as they were before normalisation by another mean",
        "training/teacher.py",
        "if not (off <= tolerance and levels.min() >= 0 and levels.max() <= 255):",
        "if off > 1:",
        (TEACHER, "-k", "another_mean or beyond_8_bits"),
    ),
    Fault(
        "the teacher's first frame for the mean of a tube",
        "training/teacher.py",
        "torch.stack([values[chosen].mean(0) for chosen in members])",
        "torch.stack([values[chosen[0]] for chosen in members])",
        (TEACHER, "-k", "plain_loop"),
    ),
    Fault(
        "the teacher's clips are videos",
        "training/teacher.py",
        "summarize(maps, frame_clip[first : first + len(maps)])",
        "summarize(maps, [0] * len(maps))",
        (TEACHER, "-k", "plain_loop"),
    ),
    # the cache
    Fault(
        "a cache of another teacher is accepted",
        "training/teacher.py",
        '_WHERE = ("path", "revision")',
        '_WHERE = ("path", "revision", "fingerprint")',
        (CACHE, "-k", "another_teacher or checks_a_teacher"),
    ),
    Fault(
        "a cache of another patch size is accepted",
        "training/teacher_shards.py",
        'for name in ("patch_size", "dtype")]',
        'for name in ("dtype",)]',
        (CACHE, "-k", "another_teacher or checks_a_teacher"),
    ),
    Fault(
        "the key of a video does not hold its grids",
        "training/teacher_cache.py",
        'f"{patches.shape[1]} {[tuple(map(int, grid)) for grid in grids]}".encode()',
        'f"{patches.shape[1]}".encode()',
        (CACHE, "-k", "another_key"),
    ),
    Fault(
        "half-written shards are read",
        "training/teacher_shards.py",
        'folder.glob("shard-*.safetensors")',
        'folder.glob("*shard-*")',
        (CACHE, "-k", "half_written"),
    ),
    Fault(
        "damaged features are not noticed",
        "training/teacher_shards.py",
        'if checksum(tensors) != self.entries[key]["crc32"]:',
        "if False:",
        (CACHE, "-k", "flipped_bit"),
    ),
    Fault(
        "what is there is taught again",
        "training/teacher_cache.py",
        "        if key in self:\n            return\n",
        "",
        (CACHE, "-k", "skips_what_is_there"),
    ),
)
