"""Faults of merging, attention and the cache."""

from .fault import Fault

EXACTNESS = "tests/test_merging_exactness.py"
CACHE = "tests/test_cache_elva.py"
STATIC = "tests/test_static_cache_elva.py"
TRANSFER = "tests/test_transfer_elva.py"
DECODER = "tests/test_decoder_elva.py"
ATTENTION = "tests/test_attention_elva.py"
KERNELS = "tests/test_kernels_elva.py"
PURE = "tests/test_merging_elva.py"
TILES = "tests/test_tiles_elva.py"
TRAINING = "tests/test_merging_training.py"

MERGING = (
    # those the design lists
    Fault(
        "positions renumbered after a merge",
        "tokens_elva.py",
        "rotary=tuple(part[:, kept] for part in tokens.rotary)",
        "rotary=tuple(part[:, : len(kept)] for part in tokens.rotary)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "a stage's key mask forgotten at decode",
        "decoder_elva.py",
        "key_mask = entry.extend_key_mask(new, batch, tokens)",
        "key_mask = None if i else entry.extend_key_mask(new, batch, tokens)",
        (EXACTNESS, "-k", "each_cached_step"),
    ),
    Fault(
        ">= for >",
        "merging_elva.py",
        "return similarity > threshold",
        "return similarity >= threshold",
        (PURE,),
    ),
    Fault(
        "sums in the precision of the tokens",
        "merging_elva.py",
        "return torch.float64 if hidden.dtype == torch.float64 else torch.float32",
        "return hidden.dtype",
        (PURE,),
    ),
    Fault(
        "similarity across the borders of videos",
        "geometry_elva.py",
        "    place = patch_video\n",
        "    place = torch.zeros_like(patch_video)\n",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "two adjacent one-frame videos are one",
        "geometry_elva.py",
        "video = _video_numbers(starts)",
        "video = _video_numbers(((kinds == VIDEO_START) & (kinds.roll(1, 1) != VIDEO_END)).cumsum(1))",
        (EXACTNESS, "-k", "adjacent_images"),
    ),
    Fault(
        "a ratio pooled over the videos of a sample",
        "geometry_elva.py",
        "_, groups = (host.patch_video * (host.num_frames + 1) + part).unique(return_inverse=True)",
        "_, groups = (host.patch_index // length * (host.num_frames + 1) + part).unique(return_inverse=True)",
        (EXACTNESS, "-k", "second_video"),
    ),
    Fault(
        "gapped positions in create_causal_mask, which takes gaps for borders of packed sequences",
        "decoder_elva.py",
        "    return packing, PackedCache(cache, filing)\n",
        """    if past is None and len(state.lengths) == 1 and packing.masks:
        from transformers.masking_utils import create_causal_mask

        packing.masks[0] = create_causal_mask(config, state.hidden[None], None, None, position_ids=state.origins[None])
    return packing, PackedCache(cache, filing)
""",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "position_ids handed to the layers",
        "decoder_elva.py",
        "state = replace(state, hidden=run_layer(layer, state.hidden[None], state.rotary, None, view, packing)[0])",
        """output = run_layer(
                layer, state.hidden[None], state.rotary, None, view, packing, position_ids=state.origins[None]
            )
            state = replace(state, hidden=output[0])""",
        (ATTENTION, "-k", "never_learns_positions"),
    ),
    # decide
    Fault(
        "similarity above one is not cut",
        "merging_elva.py",
        "similarity.clamp(max=1).masked_fill",
        "similarity.masked_fill",
        (PURE,),
    ),
    Fault(
        "similarity in the precision of the tokens",
        "merging_elva.py",
        "rows = hidden[links.order[start : start + chunk + 1]].to(similarity.dtype)",
        "rows = hidden[links.order[start : start + chunk + 1]]",
        (PURE,),
    ),
    Fault(
        "a ratio rounds down",
        "merging_elva.py",
        "math.ceil(round(target_ratio * base, 6))",
        "math.floor(round(target_ratio * base, 6))",
        (EXACTNESS, "-k", "merge_map_is_the_oracles"),
    ),
    Fault(
        "a ratio may empty a tube",
        "merging_elva.py",
        "max(now - max(math.ceil(round(target_ratio * base, 6)), floor), 0)",
        "max(now - math.ceil(round(target_ratio * base, 6)), 0)",
        (PURE, EXACTNESS, "-k", "floor or adjacent_images"),
    ),
    Fault(
        "ratio_of='input' is not read",
        "merging_elva.py",
        'bases = patches if ratio_of == "current" else inputs',
        "bases = patches",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "a window does not cut tubes",
        "geometry_elva.py",
        "ids = cut_tubes(place, frame, window, max_run)",
        "ids = cut_tubes(place, frame, None, max_run)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "a ratio is counted over the video though it has windows",
        "geometry_elva.py",
        "part = frame // window if window else torch.zeros_like(frame)",
        "part = torch.zeros_like(frame)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "max_run is not read",
        "geometry_elva.py",
        "ids = cut_tubes(place, frame, window, max_run)",
        "ids = cut_tubes(place, frame, window, None)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "frames are counted over the batch, not in their video",
        "geometry_elva.py",
        "frame = host.patch_frame - first[host.patch_video]",
        "frame = host.patch_frame",
        (EXACTNESS, "-k", "padded_batch_is_the_oracle and window"),
    ),
    # apply
    Fault(
        "a mean that ignores what tokens stand for",
        "merging_elva.py",
        "away * token_sizes[rows].to(dtype)[:, None]",
        "away",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "the first of a run survives",
        "tokens_elva.py",
        "find_survivors(merge, links, schedule.survivor)",
        'find_survivors(merge, links, "first")',
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "the last of a run survives, whatever is asked",
        "tokens_elva.py",
        "find_survivors(merge, links, schedule.survivor)",
        "find_survivors(merge, links)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "a mean without gradient",
        "merging_elva.py",
        "away = hidden.index_select(0, rows).to(dtype)",
        "away = hidden.detach().index_select(0, rows).to(dtype)",
        (EXACTNESS, "-k", "gradient_of_the_oracle"),
    ),
    Fault(
        "merged tokens read themselves at the end",
        "tokens_elva.py",
        "now=places[tokens.now]",
        "now=torch.arange(len(tokens.now), device=kept.device).clamp(max=len(kept) - 1)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "a ratio step that asks the device",
        "merging_elva.py",
        "kept = torch.nonzero_static(alive, size=num_kept).squeeze(1)",
        "kept = alive.nonzero().squeeze(1)",
        (DECODER, "-k", "never_waits"),
    ),
    Fault(
        "what has merged is not given back at the input's length",
        "tokens_elva.py",
        "merged = state.now is not state.origins",
        "merged = len(state.now) == len(state.origins)",
        (EXACTNESS, "-k", "alone_is_its_oracle"),
    ),
    Fault(
        "float64 goes to the kernels",
        "fusion_elva.py",
        "hidden.is_cuda and hidden.dtype in FUSED_DTYPES and",
        "hidden.is_cuda and",
        (KERNELS, "-k", "three_dtypes"),
    ),
    # attention and cache
    Fault(
        "one query sees holes",
        "attention_elva.py",
        "return key_mask[:, None, None]",
        "return key_mask[:, None, None] | True",
        (ATTENTION, "-k", "holes"),
    ),
    Fault(
        "as many keys as queries for FlashAttention",
        "attention_elva.py",
        '"cu_seq_lens_k": ends[-1]',
        '"cu_seq_lens_k": ends[0]',
        (ATTENTION,),
    ),
    Fault(
        "a wrapper without its mask",
        "attention_elva.py",
        "        AttentionMaskInterface.register(wrapped, ALL_MASK_ATTENTION_FUNCTIONS[name])\n",
        "",
        (ATTENTION, "-k", "beside"),
    ),
    Fault(
        "a decode mask aligned to the first key",
        "attention_elva.py",
        "q_offset=keys - queries",
        "q_offset=0",
        (ATTENTION, CACHE),
    ),
    Fault(
        "holes among the keys of the past are read",
        "decoder_elva.py",
        "stage = torch.ones(batch, layer.columns, dtype=torch.bool) if mask is None else next(copies)",
        "stage = torch.ones(batch, layer.columns, dtype=torch.bool)",
        (EXACTNESS, "-k", "second_video"),
    ),
    Fault(
        "what a static layer has yet to fill is read",
        "packing_elva.py",
        "return states[:, :, : self.past + self.width]",
        "return states",
        (CACHE, "-k", "static_cache"),
    ),
    Fault(
        "a mask of the new tokens is taken for one of the past",
        "decoder_elva.py",
        "attention_mask.shape[1] == seen + tokens\n    past_mask",
        "attention_mask.shape[1] > seen\n    past_mask",
        (CACHE, "-k", "mask_of_the_new_tokens"),
    ),
    Fault(
        "a filled cache is adopted without its padding",
        "cache_elva.py",
        "layers[0].key_mask = past_mask",
        "layers[0].survivors = past_mask",
        (CACHE, "-k", "holds_text or keeps_what_it_holds"),
    ),
    Fault(
        "physical for logical length",
        "cache_elva.py",
        "return self.columns + self.merged",
        "return self.columns",
        (CACHE,),
    ),
    Fault(
        "a tail of one column too many",
        "geometry_elva.py",
        "tail=length - 1 - int((host.patch_index % length).max())",
        "tail=length - int((host.patch_index % length).max())",
        (CACHE, EXACTNESS, "-k", "crop or merge_map"),
    ),
    Fault(
        "a crop leaves the key mask",
        "cache_elva.py",
        "self.key_mask = None if self.key_mask is None else self.key_mask[:, :-count]",
        "pass",
        (CACHE, "-k", "crop"),
    ),
    Fault(
        "a crop into the merged region goes through",
        "cache_elva.py",
        "self.is_initialized and count > self.tail",
        "self.is_initialized and count > self.columns",
        (CACHE, "-k", "crop"),
    ),
    Fault(
        "beams leave the key mask in its old order",
        "cache_elva.py",
        "        self._map(lambda record: record.index_select(0, beam_idx.to(record.device)))\n",
        "",
        (CACHE, "-k", "reordered"),
    ),
    Fault(
        "a reset leaves the lengths",
        "cache_elva.py",
        "        super().reset()\n        self._forget()\n",
        "        super().reset()\n",
        (CACHE, "-k", "reset"),
    ),
    Fault(
        "a cache of the user's own is taken for a plain one",
        "cache_elva.py",
        "any(isinstance(layer, ElvaDynamicLayer | ElvaStaticLayer) for layer in cache.layers)",
        "isinstance(cache, ElvaCache)",
        (CACHE, "-k", "users_own"),
    ),
    Fault(
        "a schedule for the new tokens merges the old ones' way",
        "modeling_elva.py",
        "else self.config.resolve_merge_schedule(merge_schedule)",
        "else self.config.resolve_merge_schedule()",
        (EXACTNESS, "-k", "of_the_call"),
    ),
    Fault(
        "a step with a static cache sees what is yet to come",
        "static_cache_elva.py",
        "frozen.key_mask = torch.zeros(",
        "frozen.key_mask = torch.ones(",
        (STATIC, "-k", "every_step"),
    ),
    Fault(
        "a compiled step reads how many tokens merged as a number of the host",
        "static_cache_elva.py",
        "return self.cumulative_length + self.lag if",
        "return self.cumulative_length + self.merged if",
        (STATIC, "-k", "merged_otherwise"),
    ),
    Fault(
        "beams leave the masks of a static cache behind",
        "static_cache_elva.py",
        "for record in (self.keys, self.values, self.key_mask, self.survivors, self.frame_index):",
        "for record in (self.keys, self.values):",
        (STATIC, "-k", "reordered"),
    ),
    Fault(
        "the head reads columns of the packed row",
        "tokens_elva.py",
        "places = layout.unpack(state.now, fill=-1)[:, columns]",
        "places = layout.unpack(state.origins, fill=-1)[:, columns].clamp(max=len(state.hidden) - 1)",
        (TRANSFER, "-k", "head_reads"),
    ),
    # training
    Fault(
        "a loss that is not divided by the items of the batch",
        "modeling_elva.py",
        "count = num_items_in_batch if num_items_in_batch is not None else max(len(learned), 1)",
        "count = max(len(learned), 1)",
        (TRAINING, "-k", "number_of_items or add_up"),
    ),
    Fault(
        "logits of a whole batch in training",
        "modeling_elva.py",
        "if labels is None or not self.training:",
        "if True:",
        (TRAINING, DECODER, "-k", "logits_exist or head_sees"),
    ),
    # attention in tiles
    Fault(
        "attention in tiles sees one token ahead",
        "tiles_elva.py",
        "-torch.inf).triu(1)",
        "-torch.inf).triu(2)",
        (TILES, "-k", "float64_gives"),
    ),
    Fault(
        "scores of attention in tiles rounded to bfloat16",
        "tiles_elva.py",
        "torch.mm(tile, keys[:, :end], out=scores)",
        "scores.copy_(torch.mm(tile.bfloat16(), keys[:, :end].bfloat16()))",
        (TILES, "-k", "large_scores"),
    ),
    Fault(
        "attention in tiles where a gradient is wanted",
        "tiles_elva.py",
        "and not torch.is_grad_enabled()\n",
        "and True\n",
        (TILES, "-k", "plain_causal_inference"),
    ),
)
