"""Faults of Video-Panda and of Mavors: sizes, equations, places in time, what may see what."""

from .fault import Fault

BLOCK = "tests/test_video_panda_alignment.py"
PANDA = "tests/test_video_panda.py"
TEACHING = "tests/test_video_panda_training.py"
CHUNKS = "tests/test_mavors_chunks.py"
TOWER = "tests/test_mavors_encoder.py"
WEIGHTS = "tests/test_mavors_towers.py"
AGGREGATOR = "tests/test_mavors_aggregator.py"
COMPRESSION = "tests/test_mavors_compression.py"
MAVORS = "tests/test_mavors_model.py"
ROWS = "tests/test_mavors_processing.py"
STAGES = "tests/test_mavors_training.py"
COMMANDS = "tests/test_siblings_commands.py"
PICTURES = "tests/viz/test_merging.py"

_PANDA = "siblings/video_panda/"
_MAVORS = "siblings/mavors/"

SIBLINGS = (
    # Video-Panda
    Fault(
        "GSTRA's keys are those that LSD leaves, as Eq. 12 is printed",
        _PANDA + "alignment_video_panda.py",
        "self._sum_up_videos(windows, geometry))",
        "self._sum_up_videos(tokens[:, None], geometry))",
        (BLOCK, "-k", "105_5 or is_its_equations"),
    ),
    Fault(
        "GSTRA sums up frame by frame",
        _PANDA + "alignment_video_panda.py",
        "        segments = geometry.patch_video.repeat_interleave(windows.shape[1])\n"
        "        videos = self.gstra(windows.flatten(0, 1), segments, num_videos)\n",
        "        segments = geometry.patch_frame.repeat_interleave(windows.shape[1])\n"
        "        return self.gstra(windows.flatten(0, 1), segments, geometry.num_frames)\n",
        (BLOCK, "-k", "hears_of_the_last"),
    ),
    Fault(
        "clips of one grid are one clip in all videos of a batch",
        _PANDA + "alignment_video_panda.py",
        "frames_of.setdefault(key, [])",
        "frames_of.setdefault((0, *key[1:]), [])",
        (BLOCK, "-k", "sees_itself_and_no_other"),
    ),
    Fault(
        "LSTE's first convolution in time is dense",
        _PANDA + "alignment_video_panda.py",
        "padding=(1, 0, 0), groups=inner)",
        "padding=(1, 0, 0))",
        (BLOCK, "-k", "45_million_parameters"),
    ),
    Fault(
        "no output projection",
        _PANDA + "alignment_video_panda.py",
        "self.o_proj = nn.Linear(width, width) if reference else nn.Identity()",
        "self.o_proj = nn.Identity()",
        (BLOCK, "-k", "45_million_parameters"),
    ),
    Fault(
        "the equations alone keep a norm",
        _PANDA + "alignment_video_panda.py",
        "self.key_norm = nn.LayerNorm(width) if reference else nn.Identity()",
        "self.key_norm = nn.LayerNorm(width)",
        (BLOCK, "-k", "quarter_short"),
    ),
    Fault(
        "LSTE sees each window on its side",
        _PANDA + "alignment_video_panda.py",
        "clip = self.lste(clip.transpose(3, 4).flatten(2, 3)",
        "clip = self.lste(clip.permute(0, 1, 2, 5, 3, 4, 6).flatten(2, 3)",
        (BLOCK, "-k", "is_its_equations"),
    ),
    Fault(
        "alpha and one minus alpha change places",
        _PANDA + "alignment_video_panda.py",
        "fused = alpha * frames + (1 - alpha) * videos",
        "fused = (1 - alpha) * frames + alpha * videos",
        (BLOCK, "-k", "is_its_equations"),
    ),
    Fault(
        "LSTE does not start at zero",
        "embedding_elva.py",
        "        init.zeros_(self.weight)\n        init.zeros_(self.bias)\n",
        "        init.normal_(self.weight, std=config.initializer_range)\n        init.zeros_(self.bias)\n",
        (BLOCK, "-k", "lste_starts"),
    ),
    Fault(
        "the reference's residual round a learned query",
        _PANDA + "alignment_video_panda.py",
        "return seen if pooled is None else pooled + seen",
        "return query + seen",
        (BLOCK, "-k", "is_its_equations"),
    ),
    Fault(
        "all frames give the latents the same tokens",
        _PANDA + "alignment_video_panda.py",
        "latents = self.downsampling(frames, rows * cols)",
        "latents = self.downsampling(frames[:1].expand_as(frames), rows * cols)",
        (BLOCK, "-k", "is_its_equations"),
    ),
    Fault(
        "the ledger forgets the row tokens",
        _PANDA + "configuration_video_panda.py",
        "specials = len(frames) + self.row_tokens * sum(rows for rows, _ in frames)",
        "specials = len(frames)",
        (BLOCK, "-k", "ledger_counts"),
    ),
    Fault(
        "16 frames by default",
        _PANDA + "processing_video_panda.py",
        'kwargs["num_frames"] = 8',
        'kwargs["num_frames"] = 16',
        (PANDA, "-k", "takes_8_frames"),
    ),
    Fault(
        "the distillation pulls away from the teacher",
        "training/distillation.py",
        "return negative_cosine_loss(student, teacher)",
        "return -negative_cosine_loss(student, teacher)",
        (TEACHING, "-k", "is_eq_19"),
    ),
    # Mavors: Eq. 1
    Fault(
        "Eq. 1 read literally: the bias is divided by F too",
        _MAVORS + "encoder_mavors.py",
        ".transpose(1, 2).flatten(2), kernel, bias)",
        ".transpose(1, 2).flatten(2), kernel, bias / weight.shape[2])",
        (TOWER, "-k", "towers_last_hidden_state"),
    ),
    Fault(
        "the division is forgotten",
        _MAVORS + "encoder_mavors.py",
        "return slices.flatten(1) / full",
        "return slices.flatten(1)",
        (TOWER, "-k", "towers_last_hidden_state"),
    ),
    Fault(
        "a table of positions that is resized edge to edge",
        _MAVORS + "encoder_mavors.py",
        'mode="bicubic", align_corners=False',
        'mode="bicubic", align_corners=True',
        (TOWER, "-k", "towers_last_hidden_state or own_grid"),
    ),
    Fault(
        "an image stands at the first place in time only",
        _MAVORS + "encoder_mavors.py",
        "last = slices[:, num_frames - 1 :].sum(1, keepdim=True)",
        "last = full * slices[:, num_frames - 1 : num_frames]",
        (TOWER, "-k", "copies_after_training or last_frame_is_repeated"),
    ),
    Fault(
        "a cut square is averaged with zeros",
        _MAVORS + "encoder_mavors.py",
        "count_include_pad=False",
        "divisor_override=pool_size**2",
        (TOWER, "-k", "averages_what"),
    ),
    Fault(
        "the kernels of a tower are divided when they are inflated",
        _MAVORS + "towers_mavors.py",
        ".repeat(1, 1, chunk_frames, 1, 1)",
        ".repeat(1, 1, chunk_frames, 1, 1) / chunk_frames",
        (WEIGHTS, "-k", "not_divided or every_kind"),
    ),
    Fault(
        "files with the prefix of older transformers are not read",
        _MAVORS + "towers_mavors.py",
        "name.endswith(_ANCHOR)]",
        "name == _ANCHOR]",
        (WEIGHTS, "-k", "every_kind"),
    ),
    # Mavors: where chunks stand in time
    Fault(
        "angles in bf16",
        _MAVORS + "aggregator_mavors.py",
        "return torch.float64 if hidden.dtype == torch.float64 else torch.float32",
        "return torch.float64 if hidden.dtype == torch.float64 else hidden.dtype",
        (AGGREGATOR, "-k", "half_precision"),
    ),
    Fault(
        "angles in float32",
        _MAVORS + "aggregator_mavors.py",
        "angles = positions.double()[:, None] * theta**-exponents",
        "angles = positions.float()[:, None] * theta**-exponents.float()",
        (AGGREGATOR, "-k", "shifting or differences"),
    ),
    Fault(
        "values turn too, so that times and not their differences count",
        _MAVORS + "aggregator_mavors.py",
        "rotate(key, *rotary), value, layout)",
        "rotate(key, *rotary), rotate(value, *rotary), layout)",
        (AGGREGATOR, "-k", "shifting"),
    ),
    Fault(
        "every chunk sees all chunks",
        _MAVORS + "aggregator_mavors.py",
        "scaled_dot_product_attention(q, k, v, is_causal=True)",
        "scaled_dot_product_attention(q, k, v)",
        (AGGREGATOR, "-k", "earlier_chunks"),
    ),
    Fault(
        "chunks are placed by their number, whatever their time",
        _MAVORS + "chunks_mavors.py",
        "position = round((times[first] - times[0]) * fps / chunk_frames * POSITION_UNIT)",
        "position = first // chunk_frames * POSITION_UNIT",
        (CHUNKS, "-k", "original_times or differences"),
    ),
    Fault(
        "chunks are placed by the clock of the file",
        _MAVORS + "chunks_mavors.py",
        "(times[first] - times[0])",
        "times[first]",
        (CHUNKS, "-k", "differences"),
    ),
    Fault(
        "sub-images of an image are chunks of one video",
        _MAVORS + "vision_mavors.py",
        "begins = (positions == 0) | (",
        "begins = torch.zeros_like(positions, dtype=torch.bool) | (",
        (MAVORS, "-k", "sub_images"),
    ),
    Fault(
        "a fast playback forgets the times",
        _MAVORS + "processing_mavors.py",
        "positions = place_chunks(sampled.times, ",
        "positions = place_chunks(None, ",
        (ROWS, "-k", "true_times"),
    ),
    # Mavors: sizes of frames, sub-images
    Fault(
        "frames have the towers' square",
        _MAVORS + "chunks_mavors.py",
        "(max(1, math.floor(side * scale / multiple + 0.5)) for side in (height, width))",
        "(max(1, math.floor(image_size / multiple + 0.5)) for side in (height, width))",
        (CHUNKS, "-k", "table"),
    ),
    Fault(
        "sides are rounded up",
        _MAVORS + "chunks_mavors.py",
        "math.floor(side * scale / multiple + 0.5)",
        "math.ceil(side * scale / multiple)",
        (CHUNKS, "-k", "table"),
    ),
    Fault(
        "N_s is rounded up",
        _MAVORS + "chunks_mavors.py",
        "ideal = height * width // image_size**2",
        "ideal = -(-height * width // image_size**2)",
        (CHUNKS, "-k", "equation_8 or counts_over"),
    ),
    Fault(
        "only N_s sub-images are tried",
        _MAVORS + "chunks_mavors.py",
        "for count in (ideal - 1, ideal, ideal + 1) if",
        "for count in (ideal,) if",
        (CHUNKS, "-k", "equation_8"),
    ),
    Fault(
        "a tie goes the other way",
        _MAVORS + "chunks_mavors.py",
        "-columns if width >= height else -rows",
        "columns if width >= height else rows",
        (CHUNKS, "-k", "ties"),
    ),
    Fault(
        "a whole image is sent twice",
        _MAVORS + "chunks_mavors.py",
        "return whole if columns * rows == 1 else whole + cut_boxes(",
        "return whole + cut_boxes(",
        (CHUNKS, "-k", "equation_8"),
    ),
    # Mavors: compression, stages, preferences
    Fault(
        "compression keeps the later token, as ELVA does",
        _MAVORS + "compression_mavors.py",
        'survivor="first"',
        'survivor="last"',
        (COMPRESSION, "-k", "plain_loop"),
    ),
    Fault(
        "merged tokens keep their room in the decoder",
        _MAVORS + "modeling_mavors.py",
        "        if compressed is not None:\n",
        "        if False:\n",
        (MAVORS, "-k", "compression_is_exact or what_compression_left"),
    ),
    Fault(
        "elva show is blind to what merged before the decoder",
        "cli/showing.py",
        '{0: f"similarity > {input_threshold:g}"}',
        "{}",
        (COMMANDS, "-k", "mavors_merged_before"),
    ),
    Fault(
        "what merged before the decoder was never among the tokens",
        "cli/showing.py",
        "merge_map.survivors[step].shape[1] - layer_tokens[0]",
        "0",
        (COMMANDS, "-k", "mavors_merged_before"),
    ),
    Fault(
        "patches that merged before the decoder taken for text",
        "viz/merging.py",
        "view.input_tokens - view.num_patches",
        "view.layer_tokens[0] - view.num_kept",
        (PICTURES, "-k", "merged_before"),
    ),
    Fault(
        "DPO forgets the reference",
        "training/preference.py",
        "rewards = beta * (policy - reference)",
        "rewards = beta * policy",
        (STAGES, "-k", "its_formula"),
    ),
    Fault(
        "the other answer is preferred",
        "training/preference.py",
        "-F.logsigmoid(rewards[:, 0] - rewards[:, 1])",
        "-F.logsigmoid(rewards[:, 1] - rewards[:, 0])",
        (STAGES, "-k", "its_formula"),
    ),
    Fault(
        "stage 1 trains the tower",
        "training/building.py",
        '"aggregator": "model.patch_embed.aggregator.",',
        '"aggregator": "model.patch_embed.",',
        (STAGES, "-k", "parts_of_the_paper_size"),
    ),
)
