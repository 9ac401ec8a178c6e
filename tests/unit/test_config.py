from typing import Any

import pytest

from trm_dist.config import IDENTITY, PER_START, Config, check_sizes, derived_sizes, resolve
from trm_dist.errors import ConfigError, ResumeError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", 0), ("depth", 0), ("heads", -1), ("seq_len", -1), ("prefix_len", -1),
        ("expansion", 0.0), ("h_cycles", 0), ("l_cycles", 0), ("batch_size", 0), ("shards", -1),
        ("seed", -1), ("epochs", 0), ("n_sup", 0), ("threads", 0), ("warmup_steps", -1),
        ("eval_interval", -1), ("weight_decay", -0.1), ("clip", float("nan")), ("lr", 0.0),
        ("puzzle_emb_ndim", -1), ("puzzle_emb_lr", 0.0), ("puzzle_emb_weight_decay", -1.0),
        ("lr", float("inf")), ("ema", 1.0), ("halt_explore", 1.0), ("checkpoint_dir", ""),
        ("checkpoint_interval", 0), ("latest_every_s", -1.0), ("keep_last", -1),
        ("keep_every", -1), ("store_deadline", -1.0), ("log_every_s", -1.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        Config().with_values({name: value})


def test_shards_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="--shards 4 does not divide --batch-size 6"):
        Config().with_values({"batch_size": 6, "shards": 4})


@pytest.mark.parametrize("batch_size", range(1, 65))
def test_default_shards_are_a_function_of_the_batch_size(batch_size: int) -> None:
    config = Config().with_values({"batch_size": batch_size})
    shards = derived_sizes(config, seq_len=1)["shards"]
    assert shards == max(each for each in (1, 2, 4, 8) if batch_size % each == 0)


def test_values_come_from_flag_then_checkpoint_then_default() -> None:
    given = Config().with_values({"lr": 0.5, "epochs": 3})
    settings = resolve(given, {"lr"}, {"lr": 0.1, "epochs": 7, "dim": 32})
    assert (settings.config.train.lr, settings.origins["lr"]) == (0.5, "given")
    assert (settings.config.train.epochs, settings.origins["epochs"]) == (7, "stored")
    assert (settings.config.model.dim, settings.origins["dim"]) == (32, "stored")
    assert (settings.config.model.depth, settings.origins["depth"]) == (2, "default")


def test_every_mismatch_is_in_one_message() -> None:
    stored = Config().with_values({"batch_size": 4, "shards": 4}).flat()
    given = Config().with_values({"dim": 7, "seed": 9, "net": "attn", "batch_size": 8})
    with pytest.raises(ResumeError) as error:
        resolve(given, {"dim", "seed", "net", "batch_size"}, stored)
    for name in ("--dim", "--seed", "--net", "--batch-size"):
        assert name in str(error.value)


def test_setting_of_identity_that_a_checkpoint_does_not_know_has_what_was_before() -> None:
    assert resolve(Config(), (), {"dim": 8}).config.model.puzzle_emb_ndim == 0
    given = Config().with_values({"puzzle_emb_ndim": 4, "prefix_len": 1})
    with pytest.raises(ResumeError, match="--puzzle-emb-ndim: stored 0, given 4"):
        resolve(given, {"puzzle_emb_ndim"}, {"dim": 8, "prefix_len": 1})


def test_flag_that_says_derive_it_matches_what_was_derived() -> None:
    settings = resolve(Config(), {"shards", "seq_len"}, {"shards": 4, "seq_len": 16})
    assert settings.config.data.shards == 4
    assert settings.config.model.seq_len == 16


def test_what_speaks_of_one_start_is_never_taken_from_a_checkpoint() -> None:
    stored = Config().with_values({"checkpoint_dir": "old", "resume": "x.pt", "overwrite": True})
    settings = resolve(Config(), (), stored.flat())
    assert {settings.origins[name] for name in PER_START} == {"default"}
    assert settings.config.checkpoint.checkpoint_dir == "checkpoints"


def test_settings_of_a_later_version_are_passed_over() -> None:
    assert resolve(Config(), (), {"not_yet": 1, "dim": 8}).config.model.dim == 8


def test_flat_round_trip() -> None:
    config = Config().with_values({"dim": 9, "lr": 0.3, "resume": "never"})
    assert Config().with_values(config.flat()) == config
    assert config.flat().keys() >= IDENTITY | PER_START


@pytest.mark.parametrize(("heads", "dim", "fits"), [(2, 8, True), (3, 8, False), (4, 4, False)])
def test_heads_divide_the_width_into_even_parts(heads: int, dim: int, fits: bool) -> None:
    model = Config().with_values({"net": "attn", "heads": heads, "dim": dim}).model
    if fits:
        check_sizes(model)
    else:
        with pytest.raises(ConfigError, match="--heads"):
            check_sizes(model)


@pytest.mark.parametrize(("length", "fits"), [(0, True), (16, True), (17, False)])
def test_vectors_of_puzzles_fit_into_the_prefix(length: int, fits: bool) -> None:
    values = {"dim": 8, "prefix_len": 2, "puzzle_emb_ndim": length}
    model = Config().with_values(values).model
    if fits:
        check_sizes(model)
    else:
        with pytest.raises(ConfigError, match="Use a prefix of 3 or more"):
            check_sizes(model)
