"""Faults of samples, of the order they come in, and of mixtures and streams."""

from .fault import Fault

DATASETS = "tests/data/test_datasets.py"
LENGTHS = "tests/data/test_lengths.py"
BATCHING = "tests/data/test_batching.py"
MIXTURES = "tests/data/test_mixtures.py"

ORDERS = (
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
    Fault(
        "flips and crops are those of the first epoch",
        "data/datasets.py",
        'random.Random(f"{self.seed}/{epoch}/{place}")',
        'random.Random(f"{self.seed}/{place}")',
        (DATASETS, "-k", "random_changes"),
    ),
    Fault(
        "bad samples far apart stop a stream",
        "data/datasets.py",
        "                bad_in_a_row = 0\n                yield",
        "                yield",
        (DATASETS, "-k", "far_apart"),
    ),
    Fault(
        "rows are not told the epoch",
        "data/datasets.py",
        """our samplers do for it.\"\"\"
        self._epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
""",
        """our samplers do for it.\"\"\"
        self._epoch.fill_(epoch)
        if False:
""",
        (DATASETS, MIXTURES),
    ),
    Fault(
        "every pass over a source in the same order",
        "data/mixtures.py",
        'self._order(count, "pass", source.name, passes)',
        'self._order(count, "pass", source.name, 0)',
        (MIXTURES,),
    ),
    Fault(
        "a stream told its epoch forgets where it was",
        "data/streams.py",
        'if self._state is not None and self._state["epoch"] != epoch:',
        "if self._state is not None:",
        (MIXTURES, "-k", "later_epoch or stateful"),
    ),
    Fault(
        "a stream in the same order in every epoch",
        "data/streams.py",
        '"stream", epoch, shard, num_shards',
        '"stream", shard, num_shards',
        (MIXTURES,),
    ),
    Fault(
        "lengths of another chat template are taken from the file",
        "data/lengths.py",
        '        "chat_template": processor.chat_template,\n',
        "",
        (LENGTHS, "-k", "another_finger"),
    ),
)
