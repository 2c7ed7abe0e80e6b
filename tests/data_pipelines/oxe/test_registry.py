"""The registry and the mixtures against the table of facts, and definitions that users write."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.oxe.mixtures import MIXTURES, Mixture, mixture_named
from data_pipelines.oxe.registry import REGISTRY, load_definitions, spec_named
from data_pipelines.oxe.spec import DatasetSpec, ReasoningKeys
from data_pipelines.oxe.standardize import required_keys, standardize
from tests.data_pipelines.oxe.cases import BY_NAME

OURS = "lara_tabletop"
LEROBOT = ("bridge_lara", "libero_lara")
# Where the facts' label is not what the vector holds; the quirks say why.
OTHER_STATE = {"droid": "POS_EULER", "fmb_dataset": "POS_QUAT", "mujoco_manip": "NONE"}


@pytest.fixture(scope="module")
def facts(shared_dir: Path) -> dict[str, Any]:
    path = shared_dir / "facts" / "oxe_registry.json"
    if not path.is_file():
        pytest.skip(f"no table of facts at {path}")
    return json.loads(path.read_text())


def test_all_datasets_are_there(facts: dict[str, Any]) -> None:
    assert len(REGISTRY) == 78
    assert set(REGISTRY) == {entry["name"] for entry in facts["datasets"]} | {OURS, *LEROBOT}
    assert all(spec.name == name for name, spec in REGISTRY.items())


def test_datasets_agree_with_the_facts(facts: dict[str, Any]) -> None:
    for entry in facts["datasets"]:
        spec = spec_named(entry["name"])
        roles = {role: camera for role, camera in entry["image_keys"].items() if camera}
        assert dict(spec.roles) == roles, spec.name
        assert {spec.cameras[camera] for camera in spec.roles.values()} == {
            f"observation/{camera}" for camera in roles.values()
        }
        assert spec.action_encoding == entry["action_encoding"], spec.name
        expected_state = OTHER_STATE.get(spec.name, entry["state_encoding"])
        assert spec.state_encoding == expected_state, spec.name
        assert spec.action_dim == entry["action_dim_standardised"], spec.name
        scaled = [mode == "q99" for mode in spec.action_modes]
        assert scaled == entry["action_normalisation_mask"], spec.name
        if entry["absolute_action_mask"] is not None:
            assert list(spec.absolute_action) == entry["absolute_action_mask"], spec.name
        if entry["language_source"].startswith("observation/"):
            assert spec.language.split(" ")[0] == re.split(":| ", entry["language_source"])[0]
        else:
            assert spec.language == "language_instruction", spec.name


def test_control_frequencies_agree_with_the_facts(facts: dict[str, Any]) -> None:
    unknown = {"stanford_mask_vit_converted_externally_to_rlds", "gnm_dataset", "mujoco_manip"}
    for entry in facts["datasets"]:
        spec = spec_named(entry["name"])
        stride = {("every(3)", "relabel(7)"): 3, ("every(5)",): 5}.get(spec.rows, 1)
        stored_hz = [hz for hz in entry["control_hz"].values() if hz is not None]
        if spec.name == "aloha_dagger_dataset":
            stored_hz = [50]  # as its transform says
        if spec.name in unknown:
            assert (stored_hz, spec.control_hz) == ([], 0), spec.name
        else:
            assert spec.control_hz * stride in stored_hz, spec.name
            disagree = len(set(stored_hz)) > 1
            assert not disagree or "Hz" in spec.quirks, spec.name


def test_the_cases_have_the_raw_features_of_the_facts(facts: dict[str, Any]) -> None:
    for entry in facts["datasets"]:
        widths = {}
        for feature in entry["raw_features_read"]:
            width = re.search(r"\((?:T,|int32\[)?(\d+)\b(?!x)", feature)
            widths[re.split(r"[ (]", feature)[0]] = int(width[1]) if width else None
        case = BY_NAME[entry["name"]]
        assert {*case.schema} <= {*widths}, entry["name"]
        for feature, shape in case.schema.items():
            found = re.search(r"\d+", str(shape))
            if widths[feature] is not None and found:
                assert int(found[0]) == widths[feature], (entry["name"], feature)
        extra = {case.language} - {*widths}
        assert set(required_keys(spec_named(entry["name"]))) <= {*widths} | extra


def test_mixtures_agree_with_the_facts(facts: dict[str, Any]) -> None:
    ours = {"lara:libero_all", "lara:bridge", "lara:bridge_rt_1"}
    assert set(MIXTURES) == {*facts["mixtures"], *ours}
    for name, entry in facts["mixtures"].items():
        mixture, first = mixture_named(name), dict(reversed(entry["entries"]))
        assert dict(mixture.entries) == first, name
        assert len(mixture.entries) + len(mixture.dropped_duplicates) == len(entry["entries"])
    assert [name for name, _ in mixture_named("openvla:rtx_franka").dropped_duplicates] == [
        "taco_play", "berkeley_cable_routing", "viola", "toto"
    ]  # fmt: skip
    assert dict(mixture_named("openvla:rtx_franka").entries)["taco_play"] == 2.0


def test_mixtures_name_known_datasets() -> None:
    for mixture in MIXTURES.values():
        for name, _ in mixture.entries:
            assert spec_named(name).name == name


@pytest.mark.parametrize("name", REGISTRY)
def test_a_spec_survives_json(name: str) -> None:
    spec = spec_named(name)
    again = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


def test_the_fingerprint_follows_the_form_and_not_the_prose() -> None:
    spec = spec_named("toto")
    assert dataclasses.replace(spec, quirks="?").fingerprint == spec.fingerprint
    assert dataclasses.replace(spec, name="x", folders=("y",)).fingerprint == spec.fingerprint
    assert dataclasses.replace(spec, rows=("drop_first",)).fingerprint != spec.fingerprint
    assert dataclasses.replace(spec, control_hz=30).fingerprint == spec.fingerprint


def test_bridge_and_tabletop_are_normalised_as_in_lara() -> None:
    motion = ("q99",) * 6
    for name in ("bridge_orig", "bridge_dataset"):
        spec = spec_named(name)
        assert (spec.action_modes, spec.state_modes) == (
            (*motion, "binary"), (*motion, "q99", "binary")
        )  # fmt: skip
        assert list(spec.cameras) == ["image_0", "image_1", "image_2", "image_3"]
    spec = spec_named(OURS)
    assert (spec.action_modes, spec.state_modes) == (
        (*motion, "none"), (*motion, "q99", "none")
    )  # fmt: skip
    assert spec.success == "episode_metadata/success"
    assert spec.reasoning == ReasoningKeys(
        subtask="reasoning/subtask", boxes="reasoning/boxes", motion="reasoning/motion"
    )


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("oxe_bridge", "bridge_lara"),
        ("libero_franka", "libero_lara"),
        ("fmb", "fmb_dataset"),
        ("robo_set", "roboset"),
        ("aloha_mobile", "aloha_mobile_dataset"),
    ],
)
def test_a_dataset_is_found_by_its_alias(alias: str, name: str) -> None:
    assert spec_named(alias) is spec_named(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brigde_orig", "did you mean: bridge_orig, bridge_oxe"),
        ("maniskill", "did you mean: maniskill_dataset_converted_externally_to_rlds"),
        ("qqq", "none of the .* known has a name like it"),
        ("my_arm", r"a table \[datasets.my_arm\] with control_hz"),
    ],
)
def test_an_unknown_dataset_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec_named(name)


def test_an_unknown_mixture_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="unknown mixture 'magic_soup'; did you mean: octo:oxe_m"):
        mixture_named("magic_soup")


USERS = """
[datasets.my_arm]
aliases = ["arm"]
control_hz = 10
cameras = { front = "observation/front" }
roles = { primary = "front" }
action = ["action/delta", "action/grip | clip | invert"]
state = ["observation/pose", "zeros(2)"]

[mixtures.mine]
source = "me"
entries = [["arm", 2], ["fmb", 1.0], ["my_arm", 0.5]]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_user_defines_a_dataset_and_a_mixture(tmp_path: Path) -> None:
    datasets, mixtures = load_definitions(write(tmp_path, USERS))
    assert set(datasets) == {"my_arm"}
    spec = spec_named("arm", datasets)
    assert (spec.name, spec.control_hz) == ("my_arm", 10.0)
    assert spec_named("bridge_orig", datasets) is spec_named("bridge_orig")
    mixture = mixture_named("mine", mixtures)
    assert mixture.entries == (("my_arm", 2.0), ("fmb_dataset", 1.0))
    assert mixture.dropped_duplicates == (("my_arm", 0.5),)
    raw = {
        "action/delta": np.zeros((2, 6)),
        "action/grip": np.array([-1.0, 0.25]),
        "observation/pose": np.zeros((2, 6)),
        "language_instruction": [b"go"] * 2,
    }
    np.testing.assert_array_equal(standardize(spec, raw).actions[:, 6], [1, 0.75])


def test_a_user_may_replace_what_is_built_in(tmp_path: Path) -> None:
    text = USERS.replace("my_arm]", "toto]\nreplaces = true").replace('"my_arm"', '"toto"')
    text = text.replace("[mixtures.mine]", '[mixtures."lara:bridge"]\nreplaces = true')
    datasets, mixtures = load_definitions(write(tmp_path, text))
    assert spec_named("toto", datasets).control_hz == 10
    assert spec_named("toto").control_hz == 30
    assert mixture_named("lara:bridge", mixtures).source == "me"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[datasets.my_arm]", "[datasets.toto]", "'toto' is built in; to take its place say"),
        ("[datasets.my_arm]", "[datasets.fmb]", "'fmb' is built in"),
        ("[mixtures.mine]", '[mixtures."octo:rtx"]', "'octo:rtx' is built in"),
        ("control_hz = 10", "control_hz = 10\nreplaces = true", "nothing built in has this name"),
        ('["arm"]', '["fmb"]', "dataset 'my_arm': alias(es) ['fmb'] are built in"),
        ('["arm", 2]', '["leg", 2]', "mixture 'mine': unknown dataset 'leg'"),
        ('["arm", 2]', '["arm", 0]', "the weight of 'arm' is 0.0"),
        ('["arm", 2]', '["arm", inf]', "the weight of 'arm' is inf"),
        ('["arm", 2]', '["arm", true]', "['arm', True] is no [dataset, weight]"),
        ('["arm", 2]', '"arm"', "'arm' is no [dataset, weight]"),
        ("source =", "sauce =", "mixture 'mine': unknown field(s) sauce; known: source, entries"),
        ("control_hz = 10\n", "", "dataset 'my_arm': field(s) control_hz missing"),
        ("control_hz = 10", "control_hz = -1", "control_hz is -1.0; it must be finite"),
        ("control_hz = 10", 'control_hz = "10"', "control_hz is '10', not a float"),
        ("aliases", "nicknames", "dataset 'my_arm': unknown field(s) nicknames; known: name"),
        ("action/grip", "grip[", "term 'grip[ | clip | invert': 'grip[' is neither"),
        ("clip", "clap", "unknown operation 'clap'; known: clip, invert"),
        ("primary =", "main =", "unknown role main; known: primary, secondary, wrist"),
        ('"front" }\naction', '"back" }\naction', "unknown camera of role 'primary': back; known"),
        ('["observation/pose", "zeros(2)"]', '"observation/pose"', "not a tuple[str, ...]"),
        ('["observation/pose", "zeros(2)"]', "[]", "the state have a term"),
        ('["action/delta", "action/grip | clip | invert"]', '["zeros(7)"]', "must read a feature"),
        ("state =", 'rows = ["sort"]\nstate =', "unknown row rule 'sort'; known: drop_first"),
        ("state =", 'language = "x[0:1]"\nstate =', "language term 'x[0:1]'"),
        ("state =", 'action_encoding = "EEF"\nstate =', "unknown action encoding EEF; known: EEF_"),
        ("state =", 'state_encoding = "POSE"\nstate =', "unknown state encoding POSE; known: NONE"),
        ("state =", 'state_modes = ["q98"]\nstate =', "unknown mode q98; known: q99"),
        (
            '"observation/pose", "zeros(2)"',
            '"observation/pose[0:5]", "observation/quaternion | euler", "x | zlib(2)", "y[-1:]"',
            "dataset 'my_arm': the state's terms give 11 columns, state_modes names 8 (the default",
        ),
        ("state =", 'action_modes = ["q99"]\nstate =', "absolute_action has 7 dimensions, action_"),
        (
            "state =",
            'action_modes = ["q99"]\nabsolute_action = [true]\nstate =',
            "an EEF_POS action has 7 dimensions, not 1",
        ),
        ("state =", 'reasoning = { subtask = "a" }\nstate =', "reasoning: field(s) boxes, m"),
        ("[mixtures.mine]", "[mixture.mine]", "unknown table(s) mixture; expected [datasets.NAME]"),
        ("[mixtures.mine]", "[mixtures]", "'mixtures' must hold tables"),
        ("[mixtures.mine]", "mixtures.mine]", "is not TOML"),
    ],
)  # fmt: skip
def test_a_bad_definition_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in USERS
    path = write(tmp_path, USERS.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_definitions(path)
    assert str(error.value).startswith(str(path))


def test_two_datasets_of_a_file_may_not_share_a_name(tmp_path: Path) -> None:
    text = USERS + USERS.split("[mixtures")[0].replace("my_arm", "other_arm")
    with pytest.raises(ValueError, match="datasets 'my_arm' and 'other_arm' share 'arm'"):
        load_definitions(write(tmp_path, text))


def test_a_missing_definition_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no definition file .*none\.toml"):
        load_definitions(tmp_path / "none.toml")


def test_a_mixture_has_entries() -> None:
    with pytest.raises(ValueError, match="mixture 'mine' has no entries"):
        Mixture(name="mine", entries=())
