"""Ranks by number, by module and by energy, and whether they are enough."""

from __future__ import annotations

import pytest
import torch

from peft_hoe import ExpertError, ExpertSpec, Ranks, build_adapter
from peft_hoe.cli import main
from peft_hoe.experts.svd import truncated_svd

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUIET = {"progress": False}
UP, DOWN, KEY = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.9, 2), (0.96, 3), (0.9999, 4)])
def test_a_share_of_the_energy_takes_the_fewest_directions(share, rank):
    # Squares 64, 28, 7 and 1 of 100.
    left, _ = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    matrix = (left * torch.tensor([64, 28, 7, 1]).double().sqrt()).float()
    factor = truncated_svd(matrix, 4, share=share, solver="exact")
    assert factor.rank == rank
    assert factor.energy == pytest.approx([0.64, 0.92, 0.99, 1.0][rank - 1])
    assert factor.half_energy == pytest.approx([0.64, 0.64, 0.92, 0.92][rank - 1])


def test_ranks_follow_from_the_energy_in_each_module_up_to_the_maximum(llama, policies, tmp_path, tiny):
    report = build_adapter(llama, policies, tmp_path / "out", r=0.7, svd="exact", **QUIET)
    pattern = tiny.config(tmp_path / "out")["rank_pattern"]
    for module, rows in report.modules.items():
        assert pattern[module] == [row.rank for row in rows.values()]
        for row in rows.values():
            assert row.energy >= 0.7
            assert row.energy * (1 - 1 / row.rank) < 0.7  # the last direction holds at most its equal part
    bounded = build_adapter(llama, policies, tmp_path / "bounded", r=Ranks(energy=0.7, maximum=3), **QUIET)
    assert max(row.rank for rows in bounded.modules.values() for row in rows.values()) == 3


def test_ranks_by_module_beat_all_others(llama, policies, tmp_path, tiny):
    ranks = Ranks(2, modules={"mlp.down_proj": 5, ".*k_proj": 1})
    build_adapter(llama, policies, tmp_path / "out", r=ranks, experts=[ExpertSpec([0.5, 0.5], r=4)], **QUIET)
    config = tiny.config(tmp_path / "out")
    assert config["rank_pattern"] == {DOWN: [5, 5, 5], KEY: [1, 1, 1]}
    assert [expert["r"] for expert in config["experts"]] == [2, 2, 4]


def test_the_command_line_takes_them(llama, policies, tmp_path, tiny, capsys):
    paths = [part for name, path in policies.items() for part in ("--policy", f"{name}={path}")]
    assert main(["build", str(llama), *paths, "--output", str(tmp_path / "a"), "--rank", "0.9", "--max-rank", "6"]) == 0
    assert "is r enough for the energy? kind " in capsys.readouterr().out
    assert tiny.config(tmp_path / "a")["experts"][0]["r"] == 6
    more = ["--rank", "2", "--module-rank", "up_proj=3", "--quiet"]
    assert main(["build", str(llama), *paths, "--output", str(tmp_path / "b"), *more]) == 0
    assert tiny.config(tmp_path / "b")["rank_pattern"] == {UP: [3, 3, 3]}


def test_the_report_says_whether_r_is_enough(llama, policies, tmp_path):
    few = build_adapter(llama, policies, tmp_path / "few", r=2, experts=[], **QUIET)
    total = few.totals("kind")
    line = next(line for line in few.table().splitlines() if line.startswith("is r enough"))
    gain = total["energy"] - total["half"]
    assert f"kind no ({total['energy']:.0%}, of which the second half of the ranks {gain:.0%})" in line
    most = build_adapter(llama, policies, tmp_path / "most", r=15, pruning=None, experts=[], **QUIET)
    assert "kind yes (" in most.table()
    every = build_adapter(llama, policies, tmp_path / "every", r="full", pruning=None, experts=[], **QUIET)
    assert every.totals("kind")["energy"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ranks(0), "r is 0; allowed are a whole number"),
        (lambda: Ranks("most"), "r is 'most'; allowed are"),
        (lambda: Ranks.of(1.5), "the share of the energy to keep is 1.5; it must be above 0 and below 1"),
        (lambda: Ranks(energy=0.9, maximum=0), "maximum is 0; it must be a whole number"),
        (lambda: Ranks(modules={"up_proj": 2.5}), "the rank of modules 'up_proj' is 2.5"),
    ],
)
def test_what_is_no_rank_is_refused(make, message):
    with pytest.raises(ExpertError, match=message):
        make()
