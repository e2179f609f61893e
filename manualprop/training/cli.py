"""The commands fit, validate, test and predict: LightningCLI with a descent, and one directory per run.

The classes are here and not in a script, because Lightning imports them to start further processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from manualprop import training
from manualprop._invocation import console_command, shown
from manualprop.descent import Descent
from manualprop.training import _usage
from manualprop.training._checks import check_architecture
from manualprop.training._errors import InputValueError, UserError
from manualprop.training._files import WholeCheckpointIO
from manualprop.training._resume import check_foreign
from manualprop.training.callbacks import (
    History,
    RecordRun,
    TrainingProgress,
    checkpoint_callbacks,
    write_csv,
)
from manualprop.training.module import DescentModule
from manualprop.training.plots import plot_history
from manualprop.training.run_directory import RunDirectory

for _name in training.__all__:
    getattr(
        training, _name
    )  # from here on all of them are known: the parser looks for classes by their names

COMMANDS = {
    "fit": "Train a network: forward pass, backward pass, update, with the descent of your choice.",
    "validate": "Evaluate a trained network on the validation examples.",
    "test": "Evaluate a trained network on the test examples.",
    "predict": "Write the predictions of a trained network for the test examples to a CSV file.",
}

# Trainer options without effect here, or that raise: the descent and the run directory replace them.
_REPLACED = {
    "accumulate_grad_batches": "Batch with micro_batch_size computes an exact gradient in pieces",
    "gradient_clip_val": "use --descent.clip_gradient_norm or --descent.clip_gradient_value",
    "gradient_clip_algorithm": "use --descent.clip_gradient_norm or --descent.clip_gradient_value",
    "default_root_dir": "use --name",
    "enable_checkpointing": "a run always keeps its best and its last checkpoint",
    "reload_dataloaders_every_n_epochs": "every epoch has its own order already",
    "use_distributed_sampler": "the examples are divided among devices exactly",
    "num_sanity_val_steps": "the data are checked before the first update",
    "model_registry": "checkpoints lie in the directory of the run",
}
# numpy's generator takes only these seeds.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])

_TRAINER_DEFAULTS = {"logger": False, "enable_model_summary": False, "max_epochs": 20, "accelerator": "auto"}


class DescentCLI(LightningCLI):
    """LightningCLI with the keys name, descent, model, data and trainer; see `docs/training.md`.

    Args:
        arguments: the command line, beginning with the subcommand.
        run: run the subcommand; False only makes the objects, from arguments without a subcommand.
    """

    def __init__(self, arguments: Sequence[str], run: bool = True) -> None:
        common = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _usage.HelpFormatter}
        described = {name: common | _described(name, text) for name, text in COMMANDS.items()}
        self.history = History()
        self.run_directory: RunDirectory | None = None
        try:
            super().__init__(
                DescentModule,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={
                    **common,
                    **described,
                    "prog": "manualprop",
                    "description": _usage.DESCRIPTION,
                },
                trainer_defaults=_TRAINER_DEFAULTS,
                args=list(arguments),
                run=run,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        finally:
            if self.run_directory is not None:
                self.run_directory.release()  # unless training has begun, the directory is as before

    # --- arguments ----------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, with the Trainer arguments that the run directory sets."""
        decided = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only"}
        training = decided | {"train_dataloaders", "val_dataloaders"}
        return {
            "fit": training,
            "validate": decided | {"verbose"},
            "test": decided | {"verbose"},
            "predict": decided | {"return_predictions"},
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the run as a whole."""
        parser.add_argument("--name", type=str, default="run", help="Results lie in runs/NAME.")
        parser.add_argument(
            "--seed_everything",
            "--seed",
            type=Seed,
            default=0,
            help="Of the initial weights, dropout and the order.",
        )
        text = "CPU threads; 1 is quickest for small networks. Leave it out for torch's own choice."
        parser.add_argument("--threads", type=PositiveInt | None, default=None, help=text)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add descent, module, data and trainer, in the order in which users look for them."""
        parser.add_subclass_arguments(Descent, "descent", required=True)
        parser.add_lightning_class_args(DescentModule, "model")
        parser.link_arguments("descent", "model.descent", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_class_arguments(
            Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=set(_REPLACED)
        )
        groups: Any = parser.groups
        for key, title in _usage.TITLES.items():
            groups[key].title = title
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.link_arguments("name", "trainer.logger.init_args.save_dir", compute_fn=_logs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, not sys.argv."""
        self.config = parser.parse_args(args)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parsers, and add the arguments that only some commands have."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for command, parser in (self._subcommand_parsers if add_subcommands else {}).items():
            if command == "fit":
                parser.add_argument(
                    "--resume", action="store_true", help="Go on from the last checkpoint of the run."
                )
                parser.add_argument(
                    "--overwrite", action="store_true", help="Replace the results of an earlier run."
                )
            else:
                text = "best, last, or the path of a checkpoint."
                parser.add_argument("--checkpoint", type=str, default="best", help=text)

    # --- objects ------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Claim the run's directory before anything slow is done."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            torch.set_num_threads(threads)
        if self.subcommand is None:
            return
        self.run_directory = RunDirectory(self._get(self.config, "name"))
        if self.subcommand == "fit" and _is_first_process():
            flags = {flag: self._get(self.config, flag) for flag in ("overwrite", "resume")}
            self.run_directory.claim(**flags)

    def instantiate_classes(self) -> None:
        """Make the objects; an error of their constructors is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ImportError as error:
            needed = " ".join(str(error).split()).removesuffix(".")
            raise InputValueError(
                f"every class of the configuration must find the packages that it needs. Got: {needed}; install what "
                "is missing, or choose another class."
            ) from error
        except OSError as error:
            raise InputValueError(
                f"every file that the configuration names must be there. Got {error.strerror or error}: "
                f"{error.filename}; correct the path."
            ) from error
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            raise InputValueError(_usage.complaint(error, _REPLACED)) from error
        for logger in self.trainer.loggers:
            if logger.log_dir and Path(logger.log_dir).exists():
                raise InputValueError(
                    f"trainer.logger must write to a directory of its own. Got {logger.log_dir}, which exists; leave "
                    "out version, and every part of the run gets a number."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the callbacks of a run added to the user's."""
        given: Any = self._get(self.config_init, "trainer")
        if given.get("check_val_every_n_epoch") == 0:
            raise InputValueError(
                "trainer.check_val_every_n_epoch must be at least 1. Got 0; to leave validation out, set "
                "trainer.limit_val_batches to 0."
            )
        callbacks = given.get("callbacks") or []
        callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *self._callbacks(given)]
        # One batch of validation first: errors show before anything changes on disk.
        kwargs |= {"callbacks": callbacks, "num_sanity_val_steps": 1}
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        kwargs["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        if self.run_directory is not None:
            kwargs["default_root_dir"] = self.run_directory.path
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, trainer: Any) -> list[Callback]:
        callbacks: list[Callback] = [self.history]
        if trainer.get("enable_progress_bar") is not False:
            callbacks.append(TrainingProgress(self._get(self.config, "name")))
        run = self.run_directory
        if run is None or self.subcommand != "fit" or trainer.get("fast_dev_run"):
            return callbacks
        self.history.path = run.history
        validates = (
            getattr(self.datamodule, "val", True) is not None
            and is_overridden("val_dataloader", self.datamodule)
            and trainer.get("limit_val_batches") != 0
        )
        keepers = checkpoint_callbacks(run, "val_loss" if validates else "train_loss")
        return [RecordRun(run, *self._recorded()), *callbacks, *keepers]

    def _recorded(self) -> tuple[dict[str, str], str]:
        """The configuration of the run: key by key, and as the text of a recipe."""
        config = self.config["fit"].clone()
        for flag in ("config", "resume", "overwrite"):  # not part of what was trained
            config.pop(flag, None)
        text = self._subcommand_parsers["fit"].dump(config, skip_validation=True, skip_unset=False)
        settings = {
            key.replace(".init_args", "").removesuffix(".class_path"): _shown(value)
            for key, value in config.items()
            if key != "name"
        }
        return settings, text

    # --- commands -----------------------------------------------------------------------------------------------

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, then say where the results are."""
        run = self._run()
        resume = self._get(self.config, "resume")
        if resume:
            check_foreign(self._read(run.last))
        try:
            self.trainer.fit(model, ckpt_path=run.last if resume else None, weights_only=True, **kwargs)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                _say(self._interrupted(run))
                raise SystemExit(130) from None
            raise
        no_update_asked = 0 in (self.trainer.max_epochs, self.trainer.max_steps)
        if not no_update_asked and 0 in (self.trainer.num_training_batches, self.trainer.limit_train_batches):
            raise InputValueError(
                "data must give at least one batch of training examples. Got none; look at the data, and at "
                "trainer.limit_train_batches."
            )
        if not self.trainer.is_global_zero:
            return
        if self.history.rows and self.history.path is not None and run.began:
            plot_history(self.history.rows, run.plots / "history.png", run.name)
        print(self._summary(run))

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        """Evaluate on the validation examples."""
        checkpoint = self._load_weights(model)
        self._report(self.trainer.validate(model, verbose=False, **kwargs), checkpoint)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Evaluate on the test examples."""
        checkpoint = self._load_weights(model)
        self._report(self.trainer.test(model, verbose=False, **kwargs), checkpoint)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write predictions to a file, and say where it is."""
        self._load_weights(model)
        outputs: Any = self.trainer.predict(model, **kwargs)
        run = self._run()
        classifies = isinstance(model, DescentModule) and model.classifies
        rows = prediction_rows(torch.cat(outputs), classifies)
        write_csv(run.predictions, rows)
        print(f"{len(rows)} predictions: {shown(run.predictions)}")

    def _report(self, results: Any, checkpoint: Path) -> None:
        for metrics in results:
            print(
                ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                + f" ({shown(checkpoint)})"
            )

    def _load_weights(self, model: LightningModule) -> Path:
        path = self._checkpoint()
        self.load(model, path)
        return path

    def load(self, model: LightningModule, path: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint, and return its whole content."""
        found = self._read(path)
        state = found.get("state_dict")
        if not isinstance(state, dict):
            raise InputValueError(
                f"A checkpoint must be a file that a training run has written. {path} holds no weights (state_dict); "
                "give another one as --checkpoint."
            )
        check_architecture(state, model)
        model.load_state_dict(state)
        return found

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways on a file of another kind
            remedy = "give another one as --checkpoint"
            if self.subcommand == "fit":
                remedy = f"copy {self._run().best} there to go on from the best one, or start anew with --overwrite"
            raise InputValueError(
                f"A checkpoint must be a file that a training run has written. {path} cannot be read as one "
                f"({type(error).__name__}); {remedy}."
            ) from error
        return found if isinstance(found, dict) else {}

    def _run(self) -> RunDirectory:
        assert self.run_directory is not None
        return self.run_directory

    def _checkpoint(self) -> Path:
        run, wanted = self._run(), str(self._get(self.config, "checkpoint"))
        path = {"best": run.best, "last": run.last}.get(wanted, Path(wanted))
        if not path.is_file():
            raise InputValueError(
                f"There must be a checkpoint to evaluate. {path} {'is a directory' if path.is_dir() else 'does not exist'}; give the --name of a run that has "
                "been trained, or the path of a checkpoint as --checkpoint."
            )
        return path

    def _interrupted(self, run: RunDirectory) -> str:
        where = f"Interrupted at update {self.trainer.global_step} (epoch {self.trainer.current_epoch + 1})."
        if not run.began or not run.last.exists():
            return f"{where} No checkpoint was written yet; run the same command again."
        again = f"{console_command()} fit --name {run.name} --resume"
        return f"{where} Last checkpoint: {shown(run.last)}. Go on with: {again}"

    def _summary(self, run: RunDirectory) -> str:
        if not self.history.rows:
            limits = f"max_epochs={self.trainer.max_epochs}, max_steps={self.trainer.max_steps}"
            return f"No update was made, and nothing was written but the configuration: {limits}."
        last = self.history.rows[-1]
        metrics = [
            f"{name} {value:.4f}" for name, value in last.items() if name.startswith(("train_", "val_"))
        ]
        done = "" if self.history.trained else "Nothing left to train; raise --trainer.max_epochs to go on.\n"
        lines = [
            f"{done}{_count(last['epoch'], 'epoch')}, {_count(last['update'], 'update')}, {last['seconds']:.1f} s",
            *textwrap.wrap(", ".join(metrics), 78),
        ]
        if self.history.path is None:
            return "\n".join([*lines, "Nothing was kept: this was a trial run (fast_dev_run)."])
        files = {"best checkpoint": run.best, "history": run.history, "plot": run.plots / "history.png"}
        lines += [f"{title + ':':<17}{shown(path)}" for title, path in files.items()]
        return "\n".join([*lines, f"{'to test it:':<17}{console_command()} test --name {run.name}"])


def _count(number: float, what: str) -> str:
    return f"{number:.0f} {what}{'s' * (number != 1)}"


def _shown(value: Any) -> str:
    """A value of the configuration as text; a class by its name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if not isinstance(value, Namespace) or "class_path" not in value:
        return str(value)
    given = value.get("init_args") or {}
    options = ", ".join(f"{key}={option}" for key, option in given.items() if option is not None)
    return f"{value.class_path.rpartition('.')[2]}({options})"


def _logs(name: str) -> str:
    """The directory of a logger: that of the run."""
    return str(Path("runs") / name)


def _described(command: str, text: str) -> dict[str, Any]:
    usage = f"manualprop {command} [--config RECIPE] [--name NAME] [--KEY VALUE ...]"
    return {"usage": usage, "description": text}


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def prediction_rows(outputs: Tensor, classifies: bool) -> list[dict[str, Any]]:
    """Return one row per example: the most likely class and its probability, or the outputs.

    Args:
        outputs: the outputs of all examples, one per row.
        classifies: whether they are probabilities of classes, along dimension 1.
    """
    if not classifies:
        table = outputs.reshape(len(outputs), -1).tolist()
        names = [f"output_{k}" for k in range(len(table[0]))]
        return [{"example": i} | dict(zip(names, row, strict=True)) for i, row in enumerate(table)]
    probability, label = outputs.max(dim=1)
    pairs = zip(label.tolist(), probability.tolist(), strict=True)
    return [{"example": i, "predicted": k, "probability": p} for i, (k, p) in enumerate(pairs)]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> DescentCLI:
    """Return the objects of a recipe (`model`, `datamodule`, `trainer`, `history`) without running it.

    Args:
        path: the YAML file.
        overrides: more arguments, as on the command line.
    """
    quieten()
    return DescentCLI(["--config", str(path), *overrides], run=False)


def quieten() -> None:
    """Switch off Lightning's announcements, and the warnings that its own code causes in torch and jsonargparse."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_ours_or_a_warning)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
        r"\s*By default only one JsonargparseDeprecationWarning",
        r"\s*``instantiate_classes`` was deprecated",
        "Checkpoint directory .* exists and is not empty",  # RunDirectory checks this
        "Be aware that when using `ckpt_path`, callbacks used",  # the log says what has changed
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_ours_or_a_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.getMessage().startswith(("engine: ", "resumed at "))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised the error, and not something that it calls."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lightning.")


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands.

    Args:
        arguments: the command line, beginning with the command.

    Returns:
        The exit status: 0; 1 if training failed; 2 for a mistake in the command; 130 after an interruption.
    """
    quieten()
    try:
        DescentCLI(_usage.with_saved_config(arguments))
    except (argparse.ArgumentError, UnicodeError) as error:
        text, status = _usage.complaint(error, _REPLACED), 2
    except UserError as error:
        text, status = str(error), error.status
    except MisconfigurationException as error:  # Lightning's error for a mistake in the configuration
        text, status = " ".join(str(error).split()), 2
    except (ValueError, TypeError, RuntimeError) as error:
        if not _raised_by_lightning(error):
            raise
        text, status = " ".join(str(error).split()), 2
    else:
        return 0
    _say(f"manualprop {arguments[0]}: {text}")
    return status
