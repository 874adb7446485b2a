"""The flags --config=FILE.py[:PRESET] and --config.any.field=value."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from lina_jax import config_fields
from lina_jax.config import Config
from lina_jax.errors import UserError


def define_flag() -> None:
    """Define --config; its value is a locked ConfigDict with the overrides applied."""
    config_flags.DEFINE_config_file("config", None, "FILE.py[:PRESET]: a file like those in configs/", lock_config=True)
    flags.FLAGS["config"].parser = _Parser()


def load(given: str) -> ml_collections.ConfigDict:
    """The locked result of `get_config` in 'FILE.py' or 'FILE.py:PRESET'. Raises UserError that says what is wrong."""
    name, colon, preset = given.partition(":")
    path = Path(name)
    if path.is_dir() or path.suffix != ".py":
        raise UserError(f"--config={given}: expected a .py file with a function get_config, like those in configs/")
    if not path.exists():
        raise UserError(f"--config={given}: no such file: {name}")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("has no function get_config")
        if colon and not inspect.signature(module.get_config).parameters:
            raise UserError("has no presets")
        config = module.get_config(*([preset] if colon else []))
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except ValueError as error:  # what a config raises about its preset
        raise UserError(f"{name}: {error}") from error
    except Exception as error:
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{name}: get_config returns {type(config).__name__}, expected a ConfigDict")
    return config.lock()


def given_flags() -> dict[str, object]:
    """{'--name': value} of the flags on the command line, without those that differ between processes."""
    values, own = flags.FLAGS, ("coordinator", "process_id")
    return {f"--{name}": values[name].value for name in sorted(values) if values[name].present and name not in own}


class _Parser(flags.ArgumentParser):
    """Loads a config like `load`, and checks the names of overrides before ml_collections does."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        config = load(path)
        for argument in sys.argv[1:]:
            if override := re.match(r"--?(?:no)?config\.([^=]*)", argument):
                config_fields.check_name(Config, override[1])
        return config
