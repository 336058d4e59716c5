"""The settings of a run, determined from its own record, its starting weights and the config.

This module contains all the rules. Flags take precedence over what was recorded, which takes
precedence over the config:

- A run that is resumed or evaluated keeps its own preprocessing, classes and examples.
- Weights that are evaluated determine all of these except the examples, and the model as well.
- A new run that starts from weights adopts their preprocessing, except for the size and the crop,
  and their head if the classes are the same.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from vvt_jax.data.examples import Cut, Source
from vvt_jax.distributed import hosts
from vvt_jax.models import Segmenter
from vvt_jax.models.vvt import model_fields
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import configuration, run_record
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.finetune import StartingWeights, read_weights
from vvt_jax.training.tasks import make_model

_SIZE = ("data.size", "data.crop_fraction")  # always set by the config in a new run
# Fields of the model that don't affect its predictions, except for rounding.
_WAYS_TO_COMPUTE = ("dtype", "drop_path_rate", "dropout", "remat", "unroll", "ffn_bands")


class Provenance:
    """The settings of a run, which all of its processes agree on.

    Attributes:
        config: the config, with the model and the preprocessing that apply.
        start: the weights to start from, or to evaluate; None if the run continues with its own.
        cuts: how the examples of each part are selected.
        told: sentences to report about these settings.

    Args:
        config: the config of the run.
        workdir: the folder of the run, or None for a run that is only inspected.
        flagged: the fields that were set on the command line, such as `data.size`.

    Raises:
        UserError: the config differs from the one that the run began with, the weights can't be
            read, or the processes disagree.
    """

    def __init__(self, config: ConfigDict, workdir: AnyPath | None, flagged: Collection[str]):
        self._workdir, self._flagged = workdir, flagged
        self._record = None if workdir is None else run_record.read(workdir)
        if self._record is not None:
            config = configuration.as_before(config, self._record.config, flagged)
        self._given = self.config = config
        self._evaluates = config.mode == "eval"
        self.told: list[str] = []
        digest = None if self._record is None else self._record.digest
        hosts.check_agreement(
            {**configuration.shared_fields(config), "the digest of the run in its workdir": digest}
        )
        if workdir is not None:
            configuration.settle(config, workdir, write=False)
        self.start: StartingWeights | None = None
        if self._record is None and config.init_from:
            self.start = self.read_start()
        self._settle_config()
        self.cuts = self._choose_cuts()

    def read_start(self) -> StartingWeights:
        """Return the weights that the config names, reading them if necessary."""
        return self.start or read_weights(self._given.init_from, make_model(self._given, 1))

    def match(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        """Compare the sources with the record, and return them with the classes that apply.

        Args:
            sources: the data sources by part, opened with `cuts`.

        Raises:
            UserError: the data has different classes or examples, or the data of the processes
                differs.
        """
        hosts.check_agreement(run_record.fingerprint(sources))
        self.told += run_record.describe_changes(self.cuts)
        if self._record is not None:
            run_record.check_counts(self._record, sources)
        names = self._card.get("class_names")
        # A new run may have different classes from the weights that it starts from.
        counts = self._record is not None or (self._evaluates and self._has_their_task())
        if not names or not counts:
            return dict(sources)
        return run_record.match_classes(sources, names, self._where, some=self._evaluates)

    def write(
        self, workdir: AnyPath, preprocessing: Mapping[str, Any], sources: Mapping[str, Source]
    ) -> None:
        """Write the record of a new run, and the config of any run."""
        if self._record is None:
            run_record.write(workdir, sources["train"].class_names, preprocessing, sources)
        configuration.settle(self._given, workdir)

    @property
    def _card(self) -> Mapping[str, Any]:
        """The recorded class names, preprocessing and inference settings, if any."""
        if self._record is not None:
            return run_record.card_of(self._record)
        return {} if self.start is None else self.start.card

    @property
    def _where(self) -> str:
        """The place where these are recorded."""
        return str(self._workdir) if self.start is None else self.start.path

    def _settle_config(self) -> None:
        goes_on = self._record is not None
        fields = run_record.fields_of(self._card, inference=self._evaluates)
        if goes_on and not self._evaluates:
            run_record.check_flags(self._given, fields, self._flagged, self._where)
        if self._evaluates and self.start is not None:
            fields = {**self._fields_of_model(self.start), **fields}
        self.config, self.told = run_record.adopt(
            self._given,
            fields,
            self._where,
            flagged=self._flagged,
            free=() if goes_on or self._evaluates else _SIZE,
        )
        names = self._card.get("class_names")
        if self._evaluates and self.start is not None and names and self._has_their_task():
            # The model may have more outputs than there are classes.
            classes = self.config.model.num_classes or self.start.model.num_classes
            self.config = configuration.replaced(self.config, {"model.num_classes": classes})

    def _fields_of_model(self, start: StartingWeights) -> dict[str, Any]:
        """Return the fields in which the weights' model differs from that of the config."""
        if start.published or "model.name" in self._flagged or not self._has_their_task():
            return {}
        theirs, ours = (model_fields(m) for m in (start.model, make_model(self._given, 1)))
        return {
            f"model.{name}": list(value) if isinstance(value, tuple) else value
            for name, value in theirs.items()
            if name in self._given.model
            and name not in (*_WAYS_TO_COMPUTE, "num_classes")
            and value != ours[name]
        }

    def _has_their_task(self) -> bool:
        """Return whether the weights are for the same task as the config's model.

        The task is classification or segmentation.
        """
        segments = bool(self._given.model.head)
        return self.start is None or isinstance(self.start.model, Segmenter) == segments

    def _choose_cuts(self) -> dict[str, Cut]:
        origin = None
        if self._record is None and self.start is not None:
            origin = run_record.find_origin(self.start.path)
            if not self._evaluates and origin is not None and origin.parts is not None:
                origin = None  # a new cut gives the same result, plus any new files
        data = self.config.data
        return run_record.choose_cuts(self._record, origin, data, splits_of(data))


def splits_of(data: ConfigDict) -> dict[str, str]:
    """Return the splits that `config.data` names, by part."""
    parts = {
        "train": data.train_split,
        "validation": data.validation_split,
        "test": data.test_split,
    }
    return {part: split for part, split in parts.items() if split}


def opened_splits(config: ConfigDict) -> dict[str, str]:
    """Return the splits that a run reads, by part.

    An evaluation doesn't read the training images, unless nothing else names the classes.

    Raises:
        ConfigError: the splits that the run needs are not set.
    """
    parts = splits_of(config.data)
    if config.mode == "train":
        if "train" not in parts:
            raise ConfigError("config.data.train_split is empty: training needs a split.")
        return parts
    measured = {part: split for part, split in parts.items() if part != "train"}
    if measured:
        return measured
    if not (config.data.eval_also and parts):
        raise ConfigError(
            "config.data.validation_split and config.data.test_split are empty: an evaluation "
            "needs one of them, or config.data.eval_also."
        )
    return parts  # for the names of the classes
