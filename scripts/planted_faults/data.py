"""Faults of the data: rows, labels, packing, samples, orders, mixtures."""

from .fault import Fault

ROWS = "tests/data/test_rows.py"
ENCODING = "tests/data/test_encoding.py"
PACKING = "tests/data/test_packing.py"
SEGMENTS = "tests/test_segments.py"
COLLATOR = "tests/data/test_collator.py"
DATASETS = "tests/data/test_datasets.py"
LENGTHS = "tests/data/test_lengths.py"
BATCHING = "tests/data/test_batching.py"
MIXTURES = "tests/data/test_mixtures.py"

DATA = (
    # rows
    Fault(
        "media of a record in another order than its placeholders",
        "data/schemas.py",
        "left = {kind: iter(sources) for kind, sources in media.items()}",
        "left = {kind: iter(sources[::-1]) for kind, sources in media.items()}",
        (ROWS, "-k", "placeholders_take"),
    ),
    Fault(
        "paths may leave the folder of the media",
        "data/rows.py",
        "        if outside:\n",
        "        if False:\n",
        (ROWS, "-k", "stay_in_it"),
    ),
    # labels
    Fault(
        "labels on what the template writes after an answer",
        "data/encoding.py",
        "labels += spoken + [IGNORED] * (len(new) - len(spoken))",
        "labels += new",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "labels on the user's turn",
        "data/encoding.py",
        "list(encoded[0]), [IGNORED] * len(encoded[0])",
        "list(encoded[0]), list(encoded[0])",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "the last token of an answer without label",
        "data/encoding.py",
        "labels += spoken + [IGNORED] * (len(new) - len(spoken))",
        "labels += spoken[:-1] + [IGNORED] * (len(new) - len(spoken) + 1)",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "an answer merges with what stands before it",
        "data/encoding.py",
        """    answers = [_SEAM + answer for answer, _ in conversation.turns]
    turns = [_SEAM + answer + rest for answer, rest in conversation.turns]
""",
        """    answers = [answer for answer, _ in conversation.turns]
    turns = [answer + rest for answer, rest in conversation.turns]
""",
        (ENCODING, "-k", "never_merges"),
    ),
    Fault(
        "padding is learnt",
        "data/collator.py",
        "pad((sample.labels for sample in samples), IGNORED)",
        "pad((sample.labels for sample in samples), pad_token_id)",
        (COLLATOR, "-k", "padded_on_the_right"),
    ),
    # shared prefix
    Fault(
        "a question sees the questions before it",
        "attention_elva.py",
        """                key_lengths.append(prefix + question)
                index += [shared, torch.arange(start, start + question)]
""",
        """                index.append(torch.arange(int(shared[0]), start + question))
                key_lengths.append(len(index[-1]))
""",
        (SEGMENTS, "-k", "gets_alone"),
    ),
    Fault(
        "a question does not see its video",
        "attention_elva.py",
        """                key_lengths.append(prefix + question)
                index += [shared, torch.arange(start, start + question)]
""",
        """                key_lengths.append(question)
                index.append(torch.arange(start, start + question))
""",
        (SEGMENTS, "-k", "gets_alone"),
    ),
    Fault(
        "positions of a question go on from the question before",
        "data/packing.py",
        "torch.where(segment_ids > PREFIX, prefix + place - began, place)",
        "place",
        (PACKING, "-k", "positions"),
    ),
    Fault(
        "a video in a question is accepted",
        "packing_elva.py",
        "if shared is not None and bool(segment_ids.flatten()[shared].any()):",
        "if False:",
        (SEGMENTS, "-k", "video_in_a_question"),
    ),
    Fault(
        "a later question's own video is dropped",
        "data/packing.py",
        "        if number and own:\n",
        "        if False:\n",
        (ENCODING, "-k", "cannot_be_independent"),
    ),
    Fault(
        "the first word of an answer follows the shared part",
        "data/packing.py",
        "for _, labels in conversations) - 1  # every",
        "for _, labels in conversations)  # every",
        (PACKING, "-k", "token_before"),
    ),
    Fault(
        "features of the teacher in another order than videos",
        "data/collator.py",
        "            tubes.append(of_clips)\n            frames.append(of_frames)\n",
        "            tubes.insert(0, of_clips)\n            frames.insert(0, of_frames)\n",
        (COLLATOR, "-k", "order_of_videos"),
    ),
    # samples
    Fault(
        "another substitute for a bad sample at every try",
        "data/datasets.py",
        'generator = random.Random(f"{seed}/{epoch}/{index}")',
        "generator = random.Random()",
        (DATASETS, "-k", "what_replaces"),
    ),
    Fault(
        "the same substitute in every epoch",
        "data/datasets.py",
        'generator = random.Random(f"{seed}/{epoch}/{index}")',
        'generator = random.Random(f"{seed}/{index}")',
        (DATASETS, "-k", "what_replaces"),
    ),
    Fault(
        "bad samples are not written down",
        "data/datasets.py",
        "        append_line(self.path, json.dumps(line, ensure_ascii=False))\n",
        "",
        (DATASETS, "-k", "replaced_and_written_down"),
    ),
    Fault(
        "too many bad samples do not stop the run",
        "data/datasets.py",
        "if seen >= self.min_samples and bad > self.max_fraction * seen:",
        "if False:",
        (DATASETS, "-k", "too_many"),
    ),
    Fault(
        "bad samples of other workers are not counted",
        "data/datasets.py",
        "torch.zeros(_SLOTS, 2, dtype=torch.long).share_memory_()  # a row",
        "torch.zeros(_SLOTS, 2, dtype=torch.long)  # a row",
        (DATASETS, "-k", "over_all_workers"),
    ),
    Fault(
        "faults of the program are bad samples",
        "data/datasets.py",
        "BAD = (ElvaError, OSError)",
        "BAD = (Exception,)",
        (DATASETS, "-k", "faults_of_the_program"),
    ),
    Fault(
        "a stream starts again after a resume",
        "data/datasets.py",
        '        self.rows.load_state_dict(state["rows"])\n',
        "",
        (DATASETS, "-k", "resumed_where_it_was"),
    ),
    # orders
    Fault(
        "a sampler forgets the epoch",
        "data/batching.py",
        "permute(places, size, seed=self.seed, epoch=epoch)",
        "permute(places, size, seed=self.seed)",
        (BATCHING, "-k", "has_not_seen"),
    ),
    Fault(
        "a grouped sampler forgets the epoch",
        "data/batching.py",
        "    def __iter__(self) -> Iterator[int]:\n        epoch = self.epoch\n",
        "    def __iter__(self) -> Iterator[int]:\n        epoch = 0\n",
        (BATCHING, "-k", "every_sample_comes_once"),
    ),
    Fault(
        "steps come sorted by length",
        "data/batching.py",
        "np.random.default_rng((self.seed, epoch, number)).permutation(len(full))",
        "np.arange(len(full))",
        (BATCHING, "-k", "not_sorted"),
    ),
    Fault(
        "padding does not count in a budget of tokens",
        "data/batching.py",
        "if (end + 1 - start) * length > max_tokens:",
        "if lengths[start : end + 1].sum() > max_tokens:",
        (BATCHING, "-k", "keep_to_their_tokens or one_more"),
    ),
    Fault(
        "a process has a batch more than another",
        "data/batching.py",
        "    while len(batches) % num_replicas:\n",
        "    while False:\n",
        (BATCHING, "-k", "ranks_step_together or halving"),
    ),
    Fault(
        "lengths of other options are taken from the file",
        "data/lengths.py",
        '        "options": dict(options),\n',
        "",
        (LENGTHS, "-k", "another_fingerprint"),
    ),
    # mixtures
    Fault(
        "weights of a mixture are not read",
        "data/sources.py",
        "return _apportion(sum(lengths), [weight or 0.0 for weight in weights])",
        "return lengths",
        (MIXTURES, "-k", "weights_share_out"),
    ),
    Fault(
        "repeat of a source is not read",
        "data/sources.py",
        "round(length * source.repeat)",
        "length",
        (MIXTURES, "-k", "as_it_is_repeated"),
    ),
    Fault(
        "the same part of a source in every epoch",
        "data/mixtures.py",
        "self._row(number, epoch * self.counts[number] + drawn)",
        "self._row(number, drawn)",
        (MIXTURES, "-k", "goes_on_in_the_next_epoch"),
    ),
    Fault(
        "workers that persist do not see the epoch change",
        "data/mixtures.py",
        "torch.zeros(1, dtype=torch.long).share_memory_()  # workers",
        "torch.zeros(1, dtype=torch.long)  # workers",
        (MIXTURES, "-k", "workers_that_persist"),
    ),
    Fault(
        "all workers read the same rows",
        "data/streams.py",
        "return self.rank * count + number, self.world_size * count",
        "return self.rank, self.world_size",
        (MIXTURES, "-k", "workers_share"),
    ),
    Fault(
        "a stream loses its buffer on resuming",
        "data/streams.py",
        '[(number, drawn) for number, drawn in state["buffer"]]',
        "[]",
        (MIXTURES, "-k", "stops_anywhere"),
    ),
    Fault(
        "a resumed stream reads its rows again",
        "data/streams.py",
        '        self.drawn = list(state["drawn"])\n',
        "",
        (MIXTURES, "-k", "stops_anywhere"),
    ),
    Fault(
        "a resumed stream draws other random numbers",
        "data/streams.py",
        '        self.random.state = state["random"]\n',
        "",
        (MIXTURES, "-k", "stops_anywhere"),
    ),
    Fault(
        "a state of another seed or number of workers is accepted",
        "data/streams.py",
        'if state["mixture"].get(name) != now:',
        "if False:",
        (MIXTURES, "-k", "another_stream"),
    ),
)
