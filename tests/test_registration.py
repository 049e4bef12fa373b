from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_hoe import HoEConfig, HoEModel, register


def test_the_member_behaves_like_any_other():
    member = PeftType.HOE
    assert member == "HOE"
    assert member.value == member.name == "HOE"
    assert PeftType("HOE") is PeftType["HOE"] is member
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps({"type": member}) == '{"type": "HOE"}'
    assert len({*PeftType}) == len(PeftType)


def test_registering_twice_is_harmless():
    register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HOE] is HoEModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.HOE] == "hoe_"


def test_a_renaming_between_two_libraries_is_no_warning_of_ours():
    """What PEFT asks every model for; a user's own filters, such as those of -W error, go first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        register()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        assert caught == []
        warnings.filterwarnings("error", category=FutureWarning)
        register()
        with pytest.raises(FutureWarning):
            warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)


def test_peft_reads_our_configs(tmp_path):
    HoEConfig(objectives=["a", "b"]).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), HoEConfig)


def test_importing_needs_none_of_the_extras(imported_by):
    assert not imported_by("peft_hoe") & {"trl", "evaluate", "moocore", "matplotlib", "datasets"}
