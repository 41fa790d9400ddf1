"""What verify found, as SARIF and as JUnit's XML: valid whatever a file says, and true to the findings."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import xmlschema
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, ValidationError

import sdsurgery as sd
from sdsurgery.inspection.findings import DONOR, SEVERITIES, FailOn, Finding, Mend, Verification, exit_code
from sdsurgery.inspection.rules import PROFILES, RULES, Severity
from sdsurgery.reports import sarif as sarif_report
from sdsurgery.reports.junit import junit
from sdsurgery.reports.sarif import sarif

SCHEMAS = ROOT / "tests" / "schemas"
SARIF = Draft7Validator(json.loads((SCHEMAS / "sarif-2.1.0.json").read_text("utf-8")))
JUNIT = xmlschema.XMLSchema10(SCHEMAS / "junit-10.xsd")

KEY = "model.diffusion_model.out.2.bias"
GAPS = sorted(name for name, rule in RULES.items() if rule.gap)
FAIL_ON = get_args(FailOn)


def finding(name: str = "value-nan", severity: Severity | None = None, **more: Any) -> Finding:
    return Finding(name, severity or RULES[name].severity, more.pop("message", "something is wrong"), **more)


def verification(*findings: Finding, path: str | Path = "model.safetensors", **more: Any) -> Verification:
    facts = {"container": "safetensors", "layout": "ldm", "family": "sd1", "profile": "ldm"}
    rules = more.pop("rules", tuple(RULES))
    return Verification(Path(path), rules=rules, findings=findings, **(facts | more))


def log(*verifications: Verification) -> dict[str, Any]:
    """The log's one run, of a log that is valid."""
    text = sarif(verifications)
    assert text.isascii()
    document = json.loads(text)
    SARIF.validate(document)
    (run,) = document["runs"]
    assert isinstance(run, dict)
    return run


def suites(*verifications: Verification, fail_on: FailOn = "error") -> list[ET.Element]:
    """The suites of a report that is valid."""
    text = junit(verifications, fail_on)
    assert text.isascii()
    JUNIT.validate(text)
    return list(ET.fromstring(text))


def texts(value: Any) -> list[str]:
    """Every string in a document."""
    if isinstance(value, dict):
        return [text for each in value.items() for text in texts(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts(each)]
    return [value] if isinstance(value, str) else []


# ---------------------------------------------------------------- whatever a file says

ODD = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=30),
    st.text(st.sampled_from("\0\x1b\r\n\t \x85\u2028\ud800\udcff\ufffe\uffff\"'<>&]{}[](\\%#?:/.$`é漢😀"), max_size=30),
    st.sampled_from([*"]]> <!----> &#0; {0} [click](http://example.com) ../../x /etc/x".split(), "k" * 5000, ""]),
)
MAYBE = st.none() | ODD
FINDINGS = st.builds(
    Finding,
    id=st.sampled_from(sorted(RULES)),
    severity=st.sampled_from(SEVERITIES),
    message=ODD,
    file=MAYBE,
    key=MAYBE,
    component=MAYBE,
    expected=MAYBE,
    seen=MAYBE,
    remedy=MAYBE,
    mend=st.none() | st.builds(Mend, st.lists(ODD, max_size=4).map(tuple), st.booleans()),
    allowed=MAYBE,
)
VERIFICATIONS = st.builds(
    Verification,
    path=ODD.map(Path),
    container=MAYBE,
    layout=MAYBE,
    family=MAYBE,
    profile=st.sampled_from((*PROFILES, "manifest")),
    rules=st.lists(st.sampled_from(sorted(RULES)), unique=True).map(tuple),
    findings=st.lists(FINDINGS, max_size=8).map(tuple),
    output=st.none() | ODD.map(Path),
)


@given(st.lists(VERIFICATIONS, max_size=3))
@settings(max_examples=150, deadline=None)
def test_sarif_is_valid_and_holds_every_finding(verifications: list[Verification]) -> None:
    run = log(*verifications)
    assert json.dumps(run) == json.dumps(log(*verifications))
    assert len(run["results"]) == sum(len(each.findings) for each in verifications)
    rules, artifacts, components = run["tool"]["driver"]["rules"], run["artifacts"], run["logicalLocations"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        place = location["physicalLocation"]["artifactLocation"]
        assert artifacts[place["index"]]["location"]["uri"] == place["uri"]
        for logical in location.get("logicalLocations", ()):
            assert logical.get("parentIndex", -1) < len(components)
            if "index" in logical:
                assert components[logical["index"]]["fullyQualifiedName"] == logical["fullyQualifiedName"]
        assert set(location["physicalLocation"]["region"]) == {"startLine", "startColumn", "endLine", "endColumn"}
        assert result["message"]["text"]
        assert "](" not in result["message"]["text"]
    for artifact in artifacts:
        assert re.fullmatch(r"(file://)?(%[0-9A-F]{2}|[A-Za-z0-9_.~/-])+", artifact["location"]["uri"])
    assert [text for text in texts(run) if not text.replace("\n", "").isprintable()] == []
    gaps = [each for each in run["invocations"][0]["toolExecutionNotifications"] if "associatedRule" in each]
    assert len(gaps) == sum(RULES[found.id].gap for each in verifications for found in each.findings)
    assert run["invocations"][0]["executionSuccessful"] is (not gaps)


@given(st.lists(VERIFICATIONS, max_size=3), st.sampled_from(FAIL_ON))
@settings(max_examples=150, deadline=None)
def test_junit_is_valid_and_agrees_with_the_exit_code(verifications: list[Verification], fail_on: FailOn) -> None:
    found = suites(*verifications, fail_on=fail_on)
    assert junit(verifications, fail_on) == junit(verifications, fail_on)
    errors = failures = 0
    for suite, each in zip(found, verifications, strict=True):
        assert {case.get("name") for case in suite.iter("testcase")} == {*each.rules, *(x.id for x in each.findings)}
        assert suite.get("tests") == str(len(suite.findall("testcase")))
        assert suite.get("errors") == str(len(suite.findall("testcase/error")))
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))
        lines = [line for child in suite.iterfind("testcase/*") for line in str(child.text).split("\n")]
        assert len(lines) == len(each.findings)
        assert all(line.isprintable() and line.startswith(SEVERITIES) for line in lines)
        errors += len(suite.findall("testcase/error"))
        failures += len(suite.findall("testcase/failure"))
    code = exit_code(verifications, fail_on)
    assert code == (3 if errors else 1 if failures else 0)


def test_the_schemas_refuse_what_is_wrong() -> None:
    document = json.loads(sarif([verification(finding())]))
    document["runs"][0]["results"][0]["level"] = "grave"
    with pytest.raises(ValidationError, match="grave"):
        SARIF.validate(document)
    text = junit([verification(finding())], "error")
    assert not JUNIT.is_valid(text.replace('failures="', 'faults="'))
    assert not JUNIT.is_valid(text.replace("<testsuites ", '<testsuites skipped="0" '))


def test_nothing_was_checked() -> None:
    run = log()
    assert (run["results"], run["artifacts"], run["tool"]["driver"]["rules"]) == ([], [], [])
    assert run["invocations"][0]["executionSuccessful"] is True
    assert suites() == []
    (suite,) = suites(verification(rules=()))
    assert suite.get("tests") == "0"


# ---------------------------------------------------------------- SARIF


def test_rules_are_those_that_were_applied() -> None:
    driver = log(
        verification(rules=("value-nan", "pickle")),
        verification(finding("container-corrupt"), rules=("position-ids-wrong", "pickle")),
    )["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("sdsurgery", sd.__version__)
    assert "informationUri" not in driver
    assert {rule["id"]: rule["name"] for rule in driver["rules"]} == {
        "container-corrupt": "ContainerCorrupt",
        "pickle": "Pickle",
        "position-ids-wrong": "PositionIdsWrong",
        "value-nan": "ValueNan",
    }
    levels = [rule["defaultConfiguration"]["level"] for rule in driver["rules"]]
    assert levels == ["error", "note", "error", "error"]


def test_every_rule_has_what_code_scanning_requires() -> None:
    rules = log(verification())["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    assert len({rule["name"] for rule in rules}) == len(rules)
    for rule in rules:
        assert re.fullmatch("([A-Z][a-z0-9]*)+", rule["name"])
        assert 0 < len(rule["shortDescription"]["text"]) <= 1024
        assert 0 < len(rule["fullDescription"]["text"]) <= 1024
        assert RULES[rule["id"]].help in rule["help"]["text"]
    by_id = {rule["id"]: rule["help"]["text"] for rule in rules}
    assert "Severity: warning; not looked for in the profile comfyui; not looked" in by_id["position-ids-missing"]
    assert by_id["value-constant"].endswith("Severity: note.")


def test_a_result_says_what_where_and_what_to_do() -> None:
    command = ("sdsurgery", "merge-vae", "my model.safetensors", DONOR, "-o", "new.safetensors")
    found = finding(
        "value-nan", key=KEY, component="unet", expected="numbers", seen="3 NaN", mend=Mend(command), remedy="not this"
    )
    run = log(verification(found, finding("pickle", message="It is a pickle.", remedy="convert it")))
    first, second = run["results"]
    assert (first["ruleId"], first["level"], second["ruleId"], second["level"]) == (
        "value-nan", "error", "pickle", "note",
    )  # fmt: skip
    assert first["message"]["text"] == (
        f"something is wrong ({KEY}, expected numbers, seen 3 NaN). To mend it: {shlex.join(command)}"
    )
    assert second["message"]["text"] == "It is a pickle. convert it"
    (location,) = first["locations"]
    (logical,) = location["logicalLocations"]
    assert (logical["fullyQualifiedName"], logical["kind"]) == (KEY, "member")
    assert run["logicalLocations"][logical["parentIndex"]]["fullyQualifiedName"] == "unet"
    assert first["properties"] == {
        "component": "unet",
        "expected": "numbers",
        "seen": "3 NaN",
        "mend": {"command": list(command), "safe": False},
    }
    assert second["properties"] == {}
    assert "logicalLocations" not in second["locations"][0]


def test_a_key_that_the_message_names_is_not_said_twice() -> None:
    (result,) = log(verification(finding(message=f"NaN in {KEY}", key=KEY)))["results"]
    assert result["message"]["text"] == f"NaN in {KEY}."


def test_a_component_without_a_key_is_a_place_too() -> None:
    run = log(verification(finding("component-missing", component="vae"), finding(component="unet", key=KEY)))
    ((vae,), (bias,)) = (result["locations"][0]["logicalLocations"] for result in run["results"])
    assert run["logicalLocations"][vae["index"]]["name"] == vae["fullyQualifiedName"] == "vae"
    assert run["logicalLocations"][bias["parentIndex"]]["name"] == "unet"


def test_the_worst_come_first_and_what_is_allowed_last() -> None:
    one = verification(finding("pickle"), finding("value-nan", allowed="known"))
    other = verification(finding("weight-missing"), finding("key-unknown"), path="other.ckpt")
    results = log(one, other)["results"]
    assert [result["ruleId"] for result in results] == ["weight-missing", "key-unknown", "pickle", "value-nan"]


def test_the_severity_is_the_findings() -> None:
    run = log(verification(*(finding("weight-missing", severity) for severity in SEVERITIES)))
    assert [result["level"] for result in run["results"]] == ["error", "warning", "note"]


def test_what_is_allowed_is_suppressed_with_its_reason() -> None:
    allowed, counted = finding(allowed="it is meant\x1b so"), finding("weight-missing")
    by_rule = {result["ruleId"]: result["suppressions"] for result in log(verification(allowed, counted))["results"]}
    assert by_rule == {
        "value-nan": [{"kind": "external", "justification": "it is meant\\x1b so"}],
        "weight-missing": [],
    }


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_is_told_of_the_run_allowed_or_not(name: str) -> None:
    for allowed in (None, "we know"):
        run = log(verification(finding(name, allowed=allowed)), verification(finding()))
        (invocation,) = run["invocations"]
        assert invocation["executionSuccessful"] is False
        (notification,) = invocation["toolExecutionNotifications"]
        assert notification["associatedRule"]["id"] == name
        assert run["tool"]["driver"]["rules"][notification["associatedRule"]["index"]]["id"] == name
        assert notification["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model.safetensors"


def test_what_is_no_gap_is_not_told_of_the_run() -> None:
    (invocation,) = log(verification(finding()))["invocations"]
    assert invocation == {"executionSuccessful": True, "toolExecutionNotifications": []}


def places(*verifications: Verification) -> list[str]:
    run = log(*verifications)
    return [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in run["results"]]


def test_places_are_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places(verification(finding(), path="models/a b#c?é%.ckpt")) == ["models/a%20b%23c%3F%C3%A9%25.ckpt"]
    assert places(verification(finding(), path="http:x")) == ["http%3Ax"]
    assert places(verification(finding(), path=tmp_path / "deep" / "a.ckpt")) == ["deep/a.ckpt"]
    assert places(verification(finding(), path="../a.ckpt")) == ["../a.ckpt"]
    outside = tmp_path.parent / "another place" / "a.ckpt"
    (uri,) = places(verification(finding(), path=outside))
    assert uri == outside.as_uri()
    assert uri.startswith("file:///")
    assert unquote(uri).endswith("/another place/a.ckpt")


def test_bytes_that_are_no_text_keep_their_uri() -> None:
    assert places(verification(finding(), path="a\udcff.ckpt"))[0].startswith("a%")
    assert places(verification(finding(file="half\ud800"), path="folder")) == ["folder/half%ED%A0%80"]


def test_a_file_of_a_folder_is_its_own_place() -> None:
    inside = finding("config-missing", file="unet/config.json")
    itself = finding("file-unused", file="folder")
    run = verification(inside, itself, finding("pickle"), path="models/folder", container="diffusers")
    assert places(run) == ["models/folder/unet/config.json", "models/folder", "models/folder"]
    assert [artifact["location"]["uri"] for artifact in log(run)["artifacts"]] == [
        "models/folder", "models/folder/unet/config.json",
    ]  # fmt: skip
    assert places(verification(finding(file="models/a.ckpt"), path="models/a.ckpt")) == ["models/a.ckpt"]


def test_what_remains_is_in_what_was_written() -> None:
    found = verification(finding(file="a.ckpt"), finding("pickle"), path="a.ckpt", output=Path("new/b.safetensors"))
    assert places(found) == ["new/b.safetensors"] * 2


def test_fingerprints_stay_in_another_folder_and_tell_findings_apart() -> None:
    def prints(path: str | Path, *found: Finding) -> list[str]:
        results = log(verification(*found, path=path))["results"]
        assert all(len(set(result["partialFingerprints"].values())) == 1 for result in results)
        return [result["partialFingerprints"]["sdsurgery/v1"] for result in results]

    found = finding(key=KEY, seen="3 NaN"), finding(key=KEY + "x", seen="3 NaN"), finding(key=KEY, seen="4 NaN")
    here = prints("models/a.ckpt", *found)
    assert here == prints("/srv/elsewhere/a.ckpt", *found)
    assert here != prints("models/b.ckpt", *found)
    assert len(set(here)) == 3
    assert here[0] == found[0].fingerprint("a.ckpt")
    assert set(log(verification(finding()))["results"][0]["partialFingerprints"]) >= {"primaryLocationLineHash"}


def test_more_than_code_scanning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sarif_report.LIMIT == 25_000
    monkeypatch.setattr(sarif_report, "LIMIT", 5)
    notes = [finding("pickle", key=str(index)) for index in range(5)]
    few = log(verification(*notes))
    assert len(few["results"]) == 5
    assert few["invocations"][0]["toolExecutionNotifications"] == []
    run = log(verification(*notes), verification(finding("value-nan"), finding("family-unknown", allowed="so")))
    assert [result["ruleId"] for result in run["results"]] == ["value-nan"] + ["pickle"] * 4
    gap, left = run["invocations"][0]["toolExecutionNotifications"]
    assert gap["associatedRule"]["id"] == "family-unknown"
    assert left["message"]["text"].startswith("2 findings are left out")
    assert left["level"] == "warning"


def test_a_key_is_no_link_and_no_command() -> None:
    (result,) = log(verification(finding(key="[click](http://example.com)\n\x1b[2J")))["results"]
    assert result["message"]["text"] == "something is wrong ([click] (http://example.com)\\n\\x1b[2J)."


# ---------------------------------------------------------------- JUnit


def cases(suite: ET.Element) -> dict[str, ET.Element]:
    return {str(case.get("name")): case for case in suite.iter("testcase")}


def test_a_suite_a_model_and_a_test_a_rule() -> None:
    one = verification(rules=("value-nan", "position-ids-wrong", "pickle"), path="models/a.ckpt")
    two = verification(finding("container-corrupt"), rules=(), path="models/a.ckpt", family=None)
    first, second = suites(one, two)
    assert first.get("name") == second.get("name") == "models/a.ckpt"
    assert {name: case.get("classname") for name, case in cases(first).items()} == {
        "pickle": "sdsurgery.container",
        "position-ids-wrong": "sdsurgery.position-ids",
        "value-nan": "sdsurgery.values",
    }
    assert list(cases(second)) == ["container-corrupt"]
    assert not [case for case in cases(first).values() if len(case)]
    assert {each.get("name"): each.get("value") for each in first.iter("property")} == {
        "profile": "ldm", "container": "safetensors", "layout": "ldm", "family": "sd1",
    }  # fmt: skip
    assert "family" not in {each.get("name") for each in second.iter("property")}
    for suite in (first, second):
        assert not {"timestamp", "hostname"} & set(suite.keys())
    assert len(suites(one, one)) == 2


EXPECTED = {"note": 3, "warning": 2, "error": 1, "never": 0}


@pytest.mark.parametrize("fail_on", FAIL_ON)
def test_what_counts_fails_and_what_doesnt_is_told(fail_on: FailOn) -> None:
    found = (
        finding("value-nan", key="one"),
        finding("key-unknown", key="two"),
        finding("pickle", key="three"),
        finding("weight-missing", key="four", allowed="not needed"),
    )
    (suite,) = suites(verification(*found), fail_on=fail_on)
    by_rule = cases(suite)
    assert suite.get("failures") == str(EXPECTED[fail_on])
    assert (suite.get("errors"), suite.get("tests")) == ("0", str(len(RULES)))
    for each in found:
        case = by_rule[each.id]
        failed = not each.allowed and fail_on != "never" and SEVERITIES.index(each.severity) >= FAIL_ON.index(fail_on)
        assert [child.tag for child in case] == ["failure" if failed else "system-out"]
        assert f"something is wrong ({each.key})" in str(case[0].text)
        assert case[0].get("type") == (each.severity if failed else None)
    assert str(by_rule["weight-missing"][0].text).endswith("(allowed: not needed)")
    assert len(by_rule["value-constant"]) == 0


def test_one_rule_that_is_in_part_allowed() -> None:
    found = finding(key="a"), finding(key="b", allowed="meant"), finding("value-nan", "note", key="c")
    case = cases(suites(verification(*found))[0])["value-nan"]
    assert [child.tag for child in case] == ["failure", "system-out"]
    assert case[0].get("message") == "something is wrong (a)."
    assert str(case[0].text).splitlines() == ["error: something is wrong (a)."]
    assert str(case[1].text).splitlines() == [
        "error: something is wrong (b). (allowed: meant)", "note: something is wrong (c).",
    ]  # fmt: skip


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("allowed", [None, "we know"])
def test_what_could_not_be_checked_is_an_error(name: str, allowed: str | None) -> None:
    found = verification(finding(name, "note", allowed=allowed, file="model.ckpt"))
    (suite,) = suites(found, fail_on="never")
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    (error,) = cases(suite)[name]
    assert (error.tag, error.get("type")) == ("error", "note")
    assert str(error.text).startswith("note: model.ckpt: something is wrong.")
    assert ("(allowed: we know)" in str(error.text)) is (allowed is not None)
    assert exit_code([found], "never") == 3


@pytest.mark.parametrize(("count", "last"), [(100, "(99)."), (101, "... and 1 more"), (250, "... and 150 more")])
def test_a_hundred_findings_are_listed(count: int, last: str) -> None:
    found = [finding(key=str(index)) for index in range(count)]
    (failure,) = cases(suites(verification(*found))[0])["value-nan"]
    lines = str(failure.text).splitlines()
    assert len(lines) == min(count, 101)
    assert lines[-1].endswith(last)
    assert failure.get("message") == "something is wrong (0)."
    quiet = [replace(each, allowed="so") for each in found]
    (out,) = cases(suites(verification(*quiet))[0])["value-nan"]
    assert len(str(out.text).splitlines()) == min(count, 101)


def test_the_mending_command_can_be_pasted() -> None:
    command = ("sdsurgery", "prune", "it's mine.ckpt")
    (failure,) = cases(suites(verification(finding(mend=Mend(command))))[0])["value-nan"]
    assert shlex.split(str(failure.get("message")).partition("To mend it: ")[2]) == list(command)


def test_control_characters_are_written_out() -> None:
    (suite,) = suites(verification(finding(key="a\0\x1b\ud800\ufffe<&]]>"), path="m\x07.ckpt"))
    assert suite.get("name") == "m\\x07.ckpt"
    assert cases(suite)["value-nan"][0].get("message") == "something is wrong (a\\x00\\x1b\\ud800\\ufffe<&]]>)."


# ---------------------------------------------------------------- both


def run_python(code: str, folder: Path) -> str:
    words: Sequence[str | Path] = (sys.executable, "-W", "error", "-c", code)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_other_runs_write_the_same_and_imports_are_light() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from sdsurgery.inspection.findings import Finding, Verification
from sdsurgery.reports.junit import junit
from sdsurgery.reports.sarif import sarif
assert not {{"junitparser", "lxml", "numpy", "torch"}} & set(sys.modules)
found = [Finding(name, "error", "x", component=name) for name in ("value-nan", "family-unknown", "weight-shape")]
both = [Verification(Path("a.ckpt"), None, None, None, "ldm", ("pickle",), tuple(found))]
print(sarif(both), junit(both, "note"))
"""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        text = run_python(code, Path(one))
        assert text == run_python(code, Path(other))
    assert Path(one).name not in text
    assert str(ROOT) not in text
