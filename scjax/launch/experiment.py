"""What is to be run: a script and its flags, checked on this machine before anything waits in a queue."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from scjax.config import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A script as it is started by hand.

    Attributes:
      script: its path.
      flags: all its flags but ``--workdir``.
      workdir: the run directory; of a sweep, the directory of its runs.
    """

    script: str
    flags: tuple[str, ...]
    workdir: str

    @property
    def launch(self) -> Path:
        """Where the launcher keeps what it made and what jobs said; a run tolerates it in its directory."""
        return Path(self.workdir) / "launch"

    @property
    def name(self) -> str:
        return Path(self.workdir).name

    def command(self, python: str) -> list[str]:
        return [python, self.script, *self.flags]


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: of a sweep, or the only one.

    Attributes:
      name: "" for the only one, else what the sweep sets, such as ``learning_rate=1e-4,seed=1``.
      overrides: flags that the sweep adds to those of the experiment.
      workdir: its run directory.
    """

    name: str
    overrides: tuple[str, ...]
    workdir: str

    @property
    def flags(self) -> list[str]:
        """What it adds to the flags of the experiment."""
        return [*self.overrides, f"--workdir={self.workdir}"]


def read_experiment(words: Sequence[str]) -> Experiment:
    """The experiment of a command line.

    Args:
      words: what stands after ``--``: ``SCRIPT.py --config=FILE.py[:ARG] --workdir=DIR ...``.

    Raises:
      FileNotFoundError: no such script or config file.
      ConfigError: no script, no ``--workdir`` or one that is no path, or an override that the config file
        does not take.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError(
            "nothing to launch: after -- goes the experiment with its flags, as in "
            "-- experiments/pretrain.py --config=configs/scgpt.py --workdir=runs/scgpt"
        )
    script, given = words[0], list(words[1:])
    if not Path(script).is_file():
        near = nearest(script, map(str, Path(script).parent.glob("*.py")))
        raise FileNotFoundError(f"no script {script} in {os.getcwd()};{near}".rstrip(";"))
    workdir, rest = _take(given, "workdir")
    if workdir is None:
        raise ConfigError(f"{script} has no --workdir: each run needs a directory of its own")
    if re.match(r"[A-Za-z][\w+.-]*://", workdir):
        raise ConfigError(
            f"--workdir={workdir} is a URL, but a run directory is a path; mount what it names where the run "
            "runs, on all machines at the same place, and give the path of that"
        )
    experiment = Experiment(script, tuple(rest), workdir)
    read_config(experiment.flags)
    return experiment


def read_config(given: Sequence[str]) -> ConfigDict | None:
    """The config of flags, with their overrides applied as the experiment itself will apply them.

    Returns:
      None where there is no ``--config``.

    Raises:
      FileNotFoundError: no such config file; names the nearest.
      ConfigError: an override of a field that the file does not have, or of a wrong type.
    """
    name, _ = _take(given, "config")
    if name is None:
        return None
    path = Path(name.partition(":")[0])
    if not path.is_file():
        near = nearest(str(path), map(str, path.parent.glob("*.py")))
        raise FileNotFoundError(f"no config file {path} in {os.getcwd()};{near}".rstrip(";"))
    overrides = [word for word in given if word.startswith(("--config.", "-config."))]
    values = _parse([f"--config={name}"])  # an error of the file itself comes as it is
    for override in overrides:  # one by one, so that the error can say which
        field = override.lstrip("-").partition("=")[0]
        try:
            _parse([f"--config={name}", override])
        except AttributeError as error:
            known = [f"config.{key}" for key in _fields(values)]
            raise ConfigError(
                f"{path} has no field {field};{nearest(field, known)} A field that the file leaves at its "
                "default must be written into the file before it can be set from outside"
            ) from error
        except (flags.Error, TypeError, ValueError) as error:
            raise ConfigError(f"{override}: {error}") from error
    return _parse([f"--config={name}", *overrides])


def sweep(experiment: Experiment, fields: Sequence[str]) -> list[Point]:
    """The runs of a grid over config fields, the last field changing fastest.

    Args:
      experiment: what every run has in common.
      fields: such as ``config.optimizer.learning_rate=1e-4,3e-4``; values are parted by commas that are not
        within brackets or quotes. None of them: the one run of the experiment.

    Raises:
      ConfigError: a field that the config file does not have (names the nearest), a value of a wrong type,
        or two runs that would be one.
    """
    axes: dict[str, list[str]] = {}
    for text in fields:
        field, equals, values = text.partition("=")
        field = field.lstrip("-")
        parts = _split(values)
        if not equals or not all(parts):
            raise ConfigError(f"--sweep {text}: give values, as in config.optimizer.learning_rate=1e-4,3e-4")
        if not field.startswith("config."):
            raise ConfigError(f"--sweep {text}: fields of the config are swept; they begin with config.")
        if field in axes:
            raise ConfigError(f"--sweep {field} is there twice; put all its values into one")
        axes[field] = parts
    if not axes:
        return [Point("", (), experiment.workdir)]
    for field, parts in axes.items():
        for value in parts:
            read_config([*experiment.flags, f"--{field}={value}"])
    last = [field.rpartition(".")[2] for field in axes]
    short = last if len(set(last)) == len(last) else [field.removeprefix("config.") for field in axes]
    points = []
    for values_ in itertools.product(*axes.values()):
        name = ",".join(f"{key}={_plain(value)}" for key, value in zip(short, values_, strict=True))
        set_ = tuple(f"--{field}={value}" for field, value in zip(axes, values_, strict=True))
        points.append(Point(name, set_, f"{experiment.workdir}/{name}"))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--sweep: several runs would go to {experiment.workdir}/{name}")
    return points


def environment_of(given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` words to a mapping; ConfigError names a word of another form."""
    for text in given:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", text, re.DOTALL):
            raise ConfigError(f"--env {text}: NAME=VALUE is needed")
    return dict(text.split("=", 1) for text in given)


def shown(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return " ".join(shlex.quote(word) for word in words)


def _parse(words: Sequence[str]) -> ConfigDict:
    """Config flags to the config, by the code that an experiment uses."""
    argv, values = ["launch", *words], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    with warnings.catch_warnings():  # ml_collections loads files in a way that newer Pythons deprecate
        warnings.simplefilter("ignore", DeprecationWarning)
        values(argv)
    return values["config"].value


def _fields(config: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, (Mapping, ConfigDict)):
            yield from _fields(value, f"{prefix}{key}.")


def _take(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of ``--flag=VALUE`` or ``--flag VALUE`` (the last one), and the words without it."""
    value, rest, i = None, [], 0
    while i < len(words):
        name, equals, text = words[i].partition("=")
        if name in (f"--{flag}", f"-{flag}") and (equals or i + 1 < len(words)):
            value = text if equals else words[i + 1]
            i += 1 if equals else 2
        else:
            rest.append(words[i])
            i += 1
    return value, rest


def _split(text: str) -> list[str]:
    """At the commas that are not within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _plain(value: str) -> str:
    """A value as part of the name of a directory."""
    try:
        value = str(ast.literal_eval(value)) if value[:1] in "'\"" else value
    except (SyntaxError, ValueError):
        pass
    return re.sub(r"[^\w.+-]+", "-", value).strip("-")
