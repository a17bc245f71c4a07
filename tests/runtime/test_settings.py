"""Settings: files on top of files, --set on top of all, and every problem in one go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from mypy import build, find_sources, nodes, options, types
from nightstream.errors import SettingsError
from nightstream.runtime import settings

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
BASE = CONF / "base.yaml"


def problems(files=(BASE,), overrides=()) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        settings.load(list(files), overrides)
    return raised.value.problems


def assert_refused_unseen(override, secret):
    """In one sentence that names the setting, and shows nothing of what matches `secret`."""
    (problem,) = problems(overrides=[override])
    assert override.partition("=")[0] in problem
    assert not re.search(secret, problem)


@pytest.mark.parametrize("name", sorted(p.name for p in CONF.glob("*.yaml")))
def test_every_file_in_conf_is_valid(name):
    settings.load([CONF / name])


def test_base_is_read_without_being_named():
    assert settings.load([CONF / "movielens.yaml"]).window == settings.load([BASE]).window


def test_a_file_away_from_conf_lies_on_the_base_of_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_text("serving: {top_k: 5}\n", encoding="utf-8")
    mine, base = settings.load([tmp_path / "mine.yaml"]), settings.load([BASE])
    assert mine.serving.top_k == 5
    assert mine.model_copy(update={"serving": base.serving}) == base


def test_a_base_beside_the_first_file_wins(tmp_path):
    text = BASE.read_text(encoding="utf-8")
    (tmp_path / "base.yaml").write_text(text.replace("top_k: 20", "top_k: 8"), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("window: {length: 7}\n", encoding="utf-8")
    assert settings.load([tmp_path / "mine.yaml"]).serving.top_k == 8
    assert settings.load(["movielens", tmp_path / "mine.yaml"]).serving.top_k == 20


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_what_lies_in_conf_needs_no_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.load([name]) == settings.load([CONF / f"{name}.yaml"])
    assert (name in settings.overlays()) == (name != "base")


def test_a_file_wins_over_an_overlay_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "movielens").write_text("serving: {top_k: 5}\n", encoding="utf-8")
    assert settings.load(["movielens"]).serving.top_k == 5


@pytest.mark.parametrize("name", ["./movielens", "conf/movielens", "movielens.yaml", ""])
def test_what_has_a_separator_or_a_suffix_is_no_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (found,) = problems([name])
    assert f"the settings file {Path(name)} cannot be read" in found


def test_a_misspelt_name_tells_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (found,) = problems(["moveilens"])
    assert found.startswith("the settings file moveilens cannot be read")
    assert found.endswith(f"overlays {', '.join(settings.overlays())}")


def test_later_files_win_and_set_wins_over_files(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "a.yaml").write_text("serving: {top_k: 5}\nwindow: {length: 7}\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("serving: {top_k: 6}\n", encoding="utf-8")
    loaded = settings.load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["window.seen_limit=9"])
    assert (loaded.serving.top_k, loaded.window.length, loaded.window.seen_limit) == (6, 7, 9)
    assert settings.load([tmp_path / "a.yaml"], ["serving.top_k=1", "serving.top_k=2"]).serving.top_k == 2


def test_a_mapping_is_replaced_and_not_mixed_with_another():
    columns = settings.load([CONF / "movielens.yaml"]).sources.events.columns
    assert columns == {"user_id": "user_id", "item_id": "item_id", "event_time": "timestamp", "value": "rating"}


def test_all_problems_come_at_once(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.read_text(encoding="utf-8"), encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        "window: {length: 0, lenght: 3}\nserving: {top_k: many}\nevents: {default_type: buy}\nsurplus: 1\n",
        encoding="utf-8",
    )
    found = problems([wrong])
    for name in ("window.length", "window.lenght", "serving.top_k", "default_type", "surplus"):
        assert any(name in p for p in found), name
    assert len(found) == 5


def test_unreadable_files_and_overrides_come_at_once(tmp_path):
    (tmp_path / "base.yaml").write_text("- a list\n", encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("a: [1,\n", encoding="utf-8")
    found = problems([tmp_path / "broken.yaml", tmp_path / "missing.yaml"], ["nonsense", "a.b={"])
    assert len(found) == 5
    assert re.search(r"broken\.yaml is not valid YAML \(line \d+\)", "\n".join(found))


@pytest.mark.parametrize(
    "override",
    [
        "window.length=0",
        "window.length=1001",
        "serving.top_k=0",
        "serving.top_k=1.5",
        "training.validation_fraction=0.5",
        "training.processes=0",
        "stream.trigger_seconds=-1",
        "stream.format=carrier-pigeon",
        "stream.metrics_seconds=0",
        "stream.metrics_seconds=3601",
        "spark.driver_memory=much",
        "retrieval.reach=0",
        "retrieval.half_life_days=0",
        "retrieval.half_life_days=soon",
        "retrieval.recency=1.5",
        "ranking.depth=13",
        "ranking.row_share=0",
        "gate.margin=1.1",
        "gate.margin=-0.1",
        "gate.min_events=0",
        "gate.sample_events=10",
        "storage.kind=cloud",
        "spark.remote=localhost:15002",
        "sync.target=mongodb",
        "sync.url=''",
        "sync.table=lists; DROP TABLE users",
        "sync.table=a.b.c",
        "sync.prefix=''",
        "sync.poll_seconds=0",
        "sync.batch_rows=0",
        "sync.retry_seconds=-1",
        "evaluation.delays_seconds=[]",
        "evaluation.delays_seconds=[-1]",
        "events.min_value=1e10",
        "events.retraction_type=view",
        "sources.events.columns={user_id: u}",
        "sources.events.columns={user_id: u, item_id: i, event_time: t, mood: m}",
    ],
)
def test_ranges(override):
    key = override.partition("=")[0]
    found = problems(overrides=[override])
    assert len(found) == 1
    assert key.rsplit(".", 1)[0] in found[0]


def test_settings_cannot_be_changed_by_a_step():
    loaded = settings.load([BASE])
    with pytest.raises(ValueError, match="frozen"):
        loaded.serving.top_k = 3


def test_secrets_come_from_the_environment_and_stay_out_of_the_settings(monkeypatch):
    options = "stream.options={user: me, password: '${env:NIGHTSTREAM_SECRET}', key: '${env:NIGHTSTREAM_OTHER}'}"
    loaded = settings.load([BASE], [options])
    with pytest.raises(SettingsError, match=r"NIGHTSTREAM_OTHER.*NIGHTSTREAM_SECRET"):
        loaded.stream.resolved_options()
    monkeypatch.setenv("NIGHTSTREAM_SECRET", "hush")
    monkeypatch.setenv("NIGHTSTREAM_OTHER", "pst")
    assert loaded.stream.resolved_options() == {"user": "me", "password": "hush", "key": "pst"}
    assert "hush" not in loaded.model_dump_json()


JAAS = "org.apache.kafka.common.security.plain.PlainLoginModule required username=me password={};"


@pytest.mark.parametrize(
    "options",
    [
        "{kafka.ssl.key.password: hush}",
        "{kafka.ssl.keystore.password: 'pre-${env:PART}'}",
        "{kafka.ssl.keystore.key: hush}",
        "{kafka.sasl.jaas.config: '" + JAAS.format('"hush"') + "'}",
        "{kafka.sasl.jaas.config: '" + JAAS.format("hush") + "'}",
        "{kafka.sasl.jaas.config: 'x required clientSecret = \"hush\";'}",
        "{kafka.ssl.key.password: 1234}",
        "hush",
        "{kafka.ssl.key.password: [hush}",
    ],
)
def test_a_secret_in_plain_text_is_refused_and_not_repeated(options):
    assert_refused_unseen(f"stream.options={options}", "hush|1234|pre-")


@pytest.mark.parametrize("remote", ["sc://host:443/;token=hush", "host:443/;token=hush"])
def test_a_token_in_the_address_of_a_server_is_refused_and_not_repeated(remote):
    assert_refused_unseen(f"spark.remote={remote}", "hush")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hush@host/0",
        "redis://:pre-${env:PART}@host/0",
        "postgresql://me:hush@host/d",
        "postgresql://me@host/d?password=hush",
        "postgresql://me@host/d?sslpassword=hush",
        "redis://[hush",
    ],
)
def test_a_password_in_the_address_of_a_store_is_refused_and_not_repeated(url):
    assert_refused_unseen(f"sync.url={json.dumps(url)}", "hush|pre-")


@pytest.mark.parametrize(
    "url", ["${env:ALL}", "redis://:${secret:scope/a-key}@host/0", "postgresql://${env:USER}:${env:PASSWORD}@h:1/d?a=b"]
)
def test_references_and_harmless_addresses_pass(url):
    assert settings.load([BASE], [f"sync.url={json.dumps(url)}"]).sync.url == url


def test_references_and_harmless_options_pass():
    options = {
        "kafka.ssl.key.password": "${env:KEY}",
        "kafka.ssl.truststore.password": " ${secret:scope/a-key} ",
        "kafka.sasl.jaas.config": JAAS.format('"${env:KEY}"'),
        "kafka.sasl.oauthbearer.token.endpoint.url": "https://where",
        "kafka.ssl.truststore.location": "/password/file",
    }
    assert settings.load([BASE], [f"stream.options={json.dumps(options)}"]).stream.options == options


def test_installations_with_one_work_dir_have_scratch_folders_of_their_own(monkeypatch, tmp_path):
    def scratch(*overrides):
        return settings.load([BASE], ["storage.work_dir=/work", *overrides]).storage.scratch("training")

    monkeypatch.chdir(tmp_path)
    roots = ["storage.root=one", "storage.root=two", "storage.root=s3://one", "storage.root=one.two"]
    folders = [scratch(root) for root in roots] + [scratch(roots[-1], "storage.kind=catalog")]
    assert {folder.parent for folder in folders} == {Path("/work")}
    assert len(set(folders)) == len(roots) + 1
    # The same tables, however they are named, and from wherever in a catalog.
    assert scratch(f"storage.root={tmp_path / 'one'}") == folders[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert scratch(roots[0]) != folders[0]
    assert scratch(roots[-1], "storage.kind=catalog") == folders[-1]


def test_every_setting_is_in_base_with_a_comment_on_its_range():
    """Each number in base.yaml says in its line what it may be."""
    bare = [
        line.strip()
        for line in BASE.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s+\w+: -?[\d.]", line) and "#" not in line
    ]
    assert bare == []
    assert settings.load([BASE])


# Methods that read a key of their own section for others.
READ_BY = {("StreamSettings", "resolved_options"): "options", ("StorageSettings", "scratch"): "work_dir"}


@pytest.fixture(scope="module")
def reads() -> set[tuple[str, str]]:
    """(section, key) of every access to an attribute of a section of the settings, by the types that mypy infers.

    What a section asks of itself is no reading: that is how it checks its keys.
    """
    chosen = options.Options()
    chosen.export_types = chosen.check_untyped_defs = chosen.explicit_package_bases = True
    chosen.ignore_missing_imports = chosen.no_site_packages = True
    chosen.incremental, chosen.follow_imports, chosen.mypy_path = False, "skip", [str(ROOT / "lib")]
    sources = find_sources.create_source_list([str(ROOT / name) for name in ("lib", "jobs", "streaming")], chosen)
    inferred = build.build(sources, chosen).types
    found = set()
    for access in inferred:
        if isinstance(access, nodes.MemberExpr) and getattr(access.expr, "name", "") != "self":
            owner = types.get_proper_type(inferred.get(access.expr))
            members = owner.items if isinstance(owner, types.UnionType) else [owner]
            found |= {
                (member.type.name, access.name)  # type: ignore[attr-defined]
                for member in map(types.get_proper_type, members)
                if isinstance(member, types.Instance) and member.type.module_name == settings.__name__
            }
    return found | {(section, key) for (section, method), key in READ_BY.items() if (section, method) in found}


def unread(keys: Iterable[tuple[str, type[settings.Section]]], reads: set[tuple[str, str]]) -> list[str]:
    return [
        key
        for key, section in keys
        if not any((ancestor.__name__, key.rpartition(".")[2]) in reads for ancestor in section.__mro__)
    ]


def test_every_setting_is_read_somewhere(reads):
    """A key that nothing reads is a promise that nobody keeps."""
    assert unread(settings.leaf_keys(), reads) == []


def test_a_key_is_not_read_where_another_section_has_one_of_its_name(reads):
    assert ("storage.root", settings.StorageSettings) in settings.leaf_keys()
    namesakes = [("gate.path", settings.GateSettings), ("window.top_k", settings.WindowSettings)]
    assert unread([*namesakes, ("stream.path", settings.StreamSettings)], reads) == ["gate.path", "window.top_k"]
