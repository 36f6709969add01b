"""The reward `remote` and its reference server: hostile servers, limits, and whole cells."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import folder_of
from PIL import Image
from servers import Asked, behaving, reward_server

from ablate import cli
from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.plugins import trust
from ablate.recipe import RewardTerm
from ablate.record import Status, read_metrics
from ablate.source import FieldError
from runners import train
from runners.distributed import join
from runners.identity import identify
from runners.policy import SD3Policy
from runners.prompts import Prompt
from runners.reward_server import Limits
from runners.rewards import load_reward
from runners.rewards.groups import whole_groups
from runners.rewards.http import MAX_ANSWER
from runners.rewards.protocol import RewardUnavailable, fixed_inputs
from runners.rewards.remote import RemoteReward
from runners.run import set_up
from runners.scoring import Scorer
from runners.tiny.scenes import ScenePrompts

GRIDS = Path(__file__).parents[2] / "grids"
PROMPTS = [Prompt(text=text) for text in "aabbccdd"]
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
SECRET = "a-token-that-nobody-sees"


def remote(url: str, **fields: Any) -> RemoteReward:
    """A client that is quickly impatient: two images a request, one request at a time."""
    quick = {"timeout": 0.3, "retries": 2, "backoff": 0.01, "max_seconds": 2, "batch_size": 2, "concurrency": 1}
    return RemoteReward(url=url, **(quick | fields))


def good(asked: Asked) -> None:
    """The mean of each image."""
    if asked.path == "/identity":
        return asked.say({"identity": "mean-1"})
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in asked.body["images"]]
    return asked.say({"identity": "mean-1", "scores": [float(np.array(image).mean()) for image in images]})


MEANS = IMAGES.mean((1, 2, 3))


# answers that can be used


def test_scores_parts_and_reasons_are_those_of_the_reward_behind_the_server() -> None:
    images, prompts = fixed_inputs()
    prompts = ScenePrompts().fixed("development", 3)
    with reward_server("scenes") as url:
        found = remote(url, timeout=10)(images, prompts)
    expected = load_reward("scenes")(images, prompts)
    np.testing.assert_array_equal(found.score, expected.score)
    np.testing.assert_array_equal(found.parts["accuracy"], expected.parts["accuracy"])
    assert found.reasons == expected.reasons


@pytest.mark.parametrize("concurrency", [1, 3])
def test_scores_are_in_order_and_do_not_depend_on_requests(concurrency: int) -> None:
    with behaving(good) as server:
        for batch_size in (1, 4, 100):
            reward = remote(server.url, batch_size=batch_size, concurrency=concurrency, timeout=5)
            np.testing.assert_array_equal(reward(IMAGES, PROMPTS).score, MEANS)
        sizes = sorted(len(asked.body["images"]) for asked in server.asked)
    assert sizes == [2, 2, 2, 2, 4, 4, 8]  # whole groups, even where two images are more than were asked for


def test_requests_hold_whole_groups() -> None:
    prompts = [Prompt(text=text) for text in "aaabbccccc"]
    assert [(s.start, s.stop) for s in whole_groups(prompts, 5)] == [(0, 5), (5, 10)]
    assert [(s.start, s.stop) for s in whole_groups(prompts, 4)] == [(0, 3), (3, 5), (5, 10)]


def test_the_server_is_asked_what_it_has_and_must_keep_it() -> None:
    served = ["mean-1"]

    def changing(asked: Asked) -> None:
        asked.say({"identity": served[0], "scores": [1.0] * len(asked.body["images"]) if asked.body else None})

    with behaving(changing) as server:
        reward = remote(server.url)
        reward.load("cpu")
        assert reward.fingerprint() == "mean-1"
        assert reward(IMAGES, PROMPTS).score.tolist() == [1.0] * 8
        served[0] = "mean-2"
        for ask in (lambda: reward(IMAGES, PROMPTS), lambda: reward.load("cpu")):
            with pytest.raises(RewardUnavailable, match="has the reward 'mean-2', expected 'mean-1'"):
                ask()
        expecting = remote(server.url, expect="mean-1")
        assert expecting.identity == "remote-1 mean-1"
        with pytest.raises(RewardUnavailable, match="mean-2"):
            expecting.load("cpu")


# servers that no client should have to meet


def with_first(wrong: Callable[[Asked], None]) -> Callable[[Asked], None]:
    """Wrong whenever it is asked about the first two images, good at the others."""

    def behave(asked: Asked) -> None:
        first = asked.body["prompts"][0]["text"] == "a"
        (wrong if first else good)(asked)

    return behave


def scores(values: str) -> Callable[[Asked], None]:
    return lambda asked: asked.say(f'{{"identity": "mean-1", "scores": {values}}}')


def flood(asked: Asked) -> None:
    """A gigabyte, as far as somebody reads it."""
    asked.handler.send_response(200)
    asked.handler.send_header("Content-Length", str(2**30))
    asked.handler.end_headers()
    asked.number = 0
    for _ in range(2**10):
        asked.handler.wfile.write(b"1" * 2**20)
        asked.number += 1


WRONG = {
    "garbage": (lambda asked: asked.say("<html>hello"), "no JSON: <html>hello"),
    "no text": (lambda asked: asked.send(b"\xff\xfe\x00"), "no JSON"),
    "nesting": (lambda asked: asked.say("[" * 10**6), "no JSON"),
    "another thing": (lambda asked: asked.say([1, 2]), "expected {'identity'"),
    "no identity": (lambda asked: asked.say({"scores": [1, 2]}), "expected {'identity'"),
    "too few": (scores("[0.5]"), "got 1 scores for 2 images"),
    "too many": (scores("[1, 2, 3]"), "got 3 scores for 2 images"),
    "not finite": (scores("[NaN, 1e999]"), "expected a finite number"),
    "text": (scores('["1", true]'), "expected a finite number"),
    "none": (scores("[null, {}]"), "expected a finite number"),
    "huge integers": (scores(f"[1{'0' * 400}, -1{'0' * 400}]"), "expected a finite number"),
    "refused": (lambda asked: asked.say("no such size", 422), "status 422: no such size"),
    "a gigabyte": (flood, f"more than {MAX_ANSWER} bytes"),
    "never": (Asked.hang, "no whole answer within 0.3 s"),
    "drip": (lambda asked: asked.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"), "no whole answer"),
    "drip in the body": (lambda asked: (asked.send(b" ", length=1000), asked.drip(b" " * 1000)), "no whole answer"),
    "closes": (Asked.close, "disconnected"),
    "closes early": (lambda asked: (asked.send(b'{"sc', length=1000), asked.close()), "RemoteProtocolError"),
    "overloaded": (lambda asked: asked.say("busy", 503), "status 503: busy (3 tried)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_answer_is_missing_with_its_reason_and_loses_nothing_else(wrong: str) -> None:
    behave, reason = WRONG[wrong]
    with behaving(with_first(behave)) as server:
        start = time.perf_counter()
        output = remote(server.url)(IMAGES, PROMPTS)
        assert time.perf_counter() - start < 2
        if wrong == "a gigabyte":
            time.sleep(0.05)
            assert server.asked[0].number < 64  # mebibytes: what a few buffers hold
    assert output.missing.tolist() == [True] * 2 + [False] * 6
    np.testing.assert_array_equal(output.score[2:], MEANS[2:])
    assert all(reason in text for text in output.reasons[:2]), output.reasons
    assert output.reasons[2:] == ("",) * 6


def test_one_number_that_is_none_is_one_image_without_a_score() -> None:
    answer = {"identity": "mean-1", "scores": [2, None], "reasons": ["", "the detector failed"], "parts": {"x": [1, 2]}}
    with behaving(with_first(lambda asked: asked.say(answer))) as server:
        output = remote(server.url)(IMAGES, PROMPTS)
    assert output.missing.tolist() == [False, True] + [False] * 6
    assert output.score[0] == 2
    assert output.reasons[1] == "the detector failed"
    np.testing.assert_array_equal(output.parts["x"], [1, 2] + [np.nan] * 6)


def test_what_passes_is_tried_again() -> None:
    def burst(asked: Asked) -> None:
        trouble = [lambda: asked.say("busy", 503), asked.close, lambda: asked.say("slow down", 429, Retry_After="0")]
        (trouble[asked.number] if asked.number < len(trouble) else lambda: good(asked))()

    with behaving(burst) as server:
        output = remote(server.url, retries=3)(IMAGES, PROMPTS)
        assert len(server.asked) == 4 + 3
    np.testing.assert_array_equal(output.score, MEANS)


def test_pauses_double_and_end_with_the_time_for_all_requests() -> None:
    times: list[float] = []

    def busy(asked: Asked) -> None:
        times.append(time.perf_counter())
        asked.say("busy", 503)

    with behaving(busy) as server, pytest.raises(RewardUnavailable, match="503"):
        remote(server.url, retries=20, backoff=0.1, max_seconds=1)(IMAGES[:2], PROMPTS[:2])
    pauses = np.diff(times)
    assert len(pauses) == 3  # 0.1 + 0.2 + 0.4; another 0.8 would be too late
    assert (pauses[1:] / pauses[:-1] > 1.5).all()


@pytest.mark.parametrize("wrong", ["never", "drip", "closes", "overloaded"])
def test_a_server_that_answers_nothing_is_unavailable_in_time(wrong: str) -> None:
    with behaving(WRONG[wrong][0]) as server:
        start = time.perf_counter()
        with pytest.raises(RewardUnavailable, match="start it"):
            remote(server.url, retries=1)(IMAGES, PROMPTS)
        assert time.perf_counter() - start < 1.8  # given up after two of four requests, with two tries of 0.3 s each
        assert len(server.asked) == 4


def test_nobody_there_is_unavailable() -> None:
    with behaving(good) as server:
        pass
    with pytest.raises(RewardUnavailable, match=r"ConnectError.*3 tried.*ablate reward-server"):
        remote(server.url).load("cpu")


@pytest.mark.parametrize("status", [302, 401, 403, 404])
def test_a_door_that_is_closed_is_not_tried_again(status: int) -> None:
    with behaving(lambda asked: asked.say("", status, Location="http://127.0.0.1:1/")) as server:
        with pytest.raises(RewardUnavailable, match=f"status {status}"):
            remote(server.url).load("cpu")
        assert len(server.asked) == 1


def test_a_piece_that_a_server_does_not_answer_is_given_up_as_a_whole() -> None:
    """By the thread that scores: no halving, which would wait once more for every part."""
    with behaving(Asked.close) as server:
        output = Scorer(remote(server.url, retries=0), 5)(IMAGES, PROMPTS)
        assert len(server.asked) == 2
    assert output.missing.all()


# the token


def test_the_token_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET + "\n")

    def telltale(asked: Asked) -> None:
        given = asked.handler.headers["Authorization"]
        if asked.body["prompts"][0]["text"] == "a":
            return asked.say(f"bad token: {given}", 422)
        return asked.say({"identity": "x", "scores": [None, 1], "reasons": [given, given]})

    with behaving(telltale) as server:
        reward = remote(server.url, token_env="MY_TOKEN")
        output = reward(IMAGES, PROMPTS)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert "***" in output.reasons[0]
    assert SECRET not in f"{output} {reward} {reward.identity} {reward.fingerprint()}"


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


@pytest.mark.parametrize(
    "answer",
    [
        f'{{"identity": "x", "scores": [null, null], "reasons": ["{escaped(SECRET)}", "{escaped(SECRET)}"]}}',
        f'{{"identity": "x", "scores": ["{escaped(SECRET)}", {{"{escaped(SECRET)}": 1}}]}}',
        f'{{"detail": "{escaped(SECRET)}"}}',
        f'"{escaped(SECRET)}',  # no JSON
    ],
)
def test_a_token_in_the_escapes_of_json_is_not_told_either(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    with behaving(lambda asked: asked.say(answer)) as server:
        output = remote(server.url, token_env="MY_TOKEN")(IMAGES[:2], PROMPTS[:2])
    assert output.missing.all()
    assert all("***" in reason and SECRET not in reason for reason in output.reasons)


def test_a_token_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(RewardUnavailable, match="set the environment variable MY_TOKEN"):
        remote("http://127.0.0.1:1", token_env="MY_TOKEN").load("cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "127.0.0.1:8400"}, "expected an address such as http://"),
        ({"url": "http://"}, "expected an address"),
        ({"url": "http://x:99999"}, "expected an address"),
        ({"url": f"http://me:{SECRET}@x"}, "no password"),
        ({"url": f"http://x?key={SECRET}"}, "no password"),
        ({"token_env": f"sk-{SECRET}"}, "name of an environment variable"),
        ({"timeout": 0}, "more than 0 seconds"),
        ({"retries": -1}, "at least 0"),
        ({"concurrency": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        remote(**{"url": "http://x"} | fields)
    assert SECRET not in str(refused.value)


# the reference server


def post(url: str, body: Any, timeout: float = 10, **headers: str) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = urllib.request.Request(f"{url}/score", content, headers)
    try:
        with urllib.request.urlopen(sent, timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def png(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(side: int) -> str:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


GREY = Image.new("RGB", (8, 8), "grey")


def asking_for(**requirement: Any) -> dict[str, Any]:
    return {"images": [png(GREY)], "prompts": [{"text": "a", "include": [{"cls": "x"} | requirement]}]}


LIMITS = Limits(images=3, pixels=200, request_bytes=5000, seconds=0.3)
REFUSED = {
    "no JSON": (b"hello", 422, "JSON"),
    "no images": ({"images": [], "prompts": []}, 413, "got 0 images, expected 1 to 3"),
    "too many images": ({"images": [png(GREY)] * 4, "prompts": [{"text": "a"}] * 4}, 413, "got 4 images"),
    "too large": (b" " * 6000, 413, "5000 bytes at most"),
    "prompts": ({"images": [png(GREY)], "prompts": []}, 422, "got 0 prompts for 1 images"),
    "no object": ([1], 422, "request: Input should be"),
    "position": (
        asking_for(count=1, position=["at", 0]),
        422,
        "prompts.0.include.0.position.0: Input should be 'left of', 'right of', 'above' or 'below'",
    ),
    "itself": (
        asking_for(count=1, position=["above", 0]),
        422,
        "include.0.position.1: got 0, expected the index of an earlier entry",
    ),
    "count": (
        asking_for(count=0),
        422,
        "prompts.0.include.0.count: Input should be greater than or equal to 1",
    ),
    "no prompt": ({"images": [png(GREY)], "prompts": [{}]}, 422, "prompts.0.text"),
    "base64": ({"images": ["!"], "prompts": [{"text": "a"}]}, 422, "image 0 is not base64"),
    "pixels": ({"images": [png(GREY.resize((20, 20)))], "prompts": [{"text": "a"}]}, 422, "20 x 20 pixels, expected"),
    "bomb": ({"images": [bomb(60000)], "prompts": [{"text": "a"}]}, 422, "image 0"),
    "damaged": ({"images": [bomb(10)], "prompts": [{"text": "a"}]}, 422, "image 0 cannot be read as a PNG"),
    "jpeg": ({"images": [png(GREY, "JPEG")], "prompts": [{"text": "a"}]}, 422, "cannot be read as a PNG"),
    "grey": ({"images": [png(GREY.convert("L"))], "prompts": [{"text": "a"}]}, 422, "mode L, expected 8-bit RGB"),
    "sizes": ({"images": [png(GREY), png(GREY.resize((9, 9)))], "prompts": [{"text": "a"}] * 2}, 422, "image 1 is"),
}  # fmt: skip


def test_the_server_refuses_what_it_cannot_score_and_goes_on() -> None:
    with reward_server("jpeg", limits=LIMITS) as url:
        for name, (body, status, message) in REFUSED.items():
            got, answer = post(url, body)
            assert (name, got) == (name, status)
            assert message in answer["detail"], name
        status, answer = post(url, {"images": [png(GREY)], "prompts": [{"text": "a"}]})
    assert status == 200
    expected = load_reward("jpeg")(np.array(GREY)[None], [Prompt(text="a")]).score
    assert answer == {"identity": "jpeg-1", "scores": expected.tolist(), "parts": {}, "reasons": []}


def test_the_request_in_the_docs_is_answered_as_there() -> None:
    page = (GRIDS.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    request, answer = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with reward_server("jpeg") as url:
        status, got = post(url, request.encode())
    expected = json.loads(answer)
    assert (status, got | {"scores": []}) == (200, expected | {"scores": []})
    assert len(got["scores"]) == len(expected["scores"])


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\n"
BODY = json.dumps({"images": [png(GREY)], "prompts": [{"text": "a"}]}).encode()


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_the_server_does_not_wait_for_a_client_that_dawdles() -> None:
    with reward_server("jpeg", limits=LIMITS) as url, connected(url) as slow:
        slow.sendall(HEAD + b"Content-Length: 4000\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + HEAD])
def test_a_connection_on_which_no_request_begins_is_closed(begun: bytes) -> None:
    """Also after one that was answered."""
    with reward_server("jpeg", limits=LIMITS) as url, connected(url) as idle:
        idle.sendall(begun)
        start, received = time.perf_counter(), b""
        while part := idle.recv(2**16):
            received += part
        assert 0.2 < time.perf_counter() - start < 3
    assert received.count(b"HTTP/1.1 200") == begun.count(BODY)


def test_a_server_whose_connections_are_all_held_is_free_again_soon() -> None:
    limits = Limits(seconds=0.3, connections=3)
    with reward_server("jpeg", limits=limits) as url:
        idle = [connected(url) for _ in range(3)]
        time.sleep(0.1)
        with connected(url) as refused:
            refused.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            assert refused.recv(100).startswith(b"HTTP/1.1 503")
        assert [connection.recv(1) for connection in idle] == [b""] * 3  # closed by the server
        assert post(url, BODY)[0] == 200
        for connection in idle:
            connection.close()


def test_headers_without_end_are_refused() -> None:
    with reward_server("jpeg", limits=Limits(header_bytes=1000)) as url, connected(url) as endless:
        endless.sendall(HEAD + b"X: " + b"x" * 2000)
        assert endless.recv(100).startswith(b"HTTP/1.1 400")


def test_a_group_is_a_part_of_a_prompt_that_the_server_heeds() -> None:
    prompts = [Prompt(text="a", group=group) for group in (0, 0, 1, 1)]
    with reward_server("pairwise", reward="jpeg") as url:
        found = remote(url, timeout=5, batch_size=8)(IMAGES[:4], prompts)
    expected = load_reward((RewardTerm(name="pairwise", reward="jpeg"),))(IMAGES[:4], prompts)
    np.testing.assert_array_equal(found.score, expected.score)
    assert sorted(found.score[:2]) == sorted(found.score[2:]) == [0, 1]


def test_a_long_identity_is_told_with_the_digest_of_the_whole() -> None:
    told = set()
    for end in "ab":
        with reward_server("own_rewards:until_told", file="x" * 300 + end) as url:
            reward = remote(url, timeout=5)
            reward.load("cpu")
            told.add(reward.fingerprint())
    assert len(told) == 2
    assert all(len(identity) == 200 and identity.startswith("own_rewards:until_told@") for identity in told)


def test_a_server_with_a_token_answers_nobody_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"images": [png(GREY)], "prompts": [{"text": "a"}]}
    with reward_server("jpeg", token=SECRET) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}):
            assert post(url, body, **headers)[0] == 401
            assert post(url, b"no JSON", **headers)[0] == 401  # before anything is read
        with pytest.raises(RewardUnavailable, match="status 401"):
            remote(url, timeout=5).load("cpu")
        monkeypatch.setenv("MY_TOKEN", SECRET)
        reward = remote(url, timeout=5, token_env="MY_TOKEN")
        reward.load("cpu")
        assert reward.fingerprint() == "jpeg-1"
        assert not reward(IMAGES, PROMPTS).missing.any()


def test_one_request_is_scored_at_a_time_and_a_failing_image_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "slow_reward.py").write_text(
        "import threading, time\n"
        "lock = threading.Lock()\n"
        "def slow(images, prompts):\n"
        "    assert lock.acquire(blocking=False), 'two at once'\n"
        "    time.sleep(0.02)\n"
        "    lock.release()\n"
        "    if any(prompt.text == 'c' for prompt in prompts):\n"
        "        raise MemoryError('too much')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    trust(tmp_path)
    with reward_server("slow_reward:slow") as url:
        output = remote(url, concurrency=4, timeout=5, batch_size=4)(IMAGES, PROMPTS)
    assert output.missing.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert "MemoryError: too much" in output.reasons[4]
    np.testing.assert_array_equal(output.score[:4], MEANS[:4])


def test_what_nobody_waits_for_any_more_is_not_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "counting_reward.py").write_text(
        "import time\n"
        "scored = []\n"
        "def count(images, prompts):\n"
        "    scored.append(prompts[0].text)\n"
        "    time.sleep(0.4)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    trust(tmp_path)
    with reward_server("counting_reward:count") as url:
        at_work = threading.Thread(target=post, args=(url, {"images": [png(GREY)], "prompts": [{"text": "first"}]}))
        at_work.start()
        time.sleep(0.1)
        with pytest.raises(TimeoutError):
            post(url, {"images": [png(GREY)], "prompts": [{"text": "impatient"}]}, timeout=0.1)
        at_work.join()
        assert post(url, {"images": [png(GREY)], "prompts": [{"text": "last"}]})[0] == 200
    assert sys.modules["counting_reward"].scored == ["first", "last"]


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ablate.cli", "reward-server", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "ABLATE_REWARD_TOKEN"}, **environment},
    )


def test_the_command_says_what_it_serves_and_ends_in_order() -> None:
    server = command("jpeg", "--set", "incompressible=true", "--port", "0", PYTHONUNBUFFERED="1")
    try:
        line = server.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+) has the reward jpeg-incompressible-1; stop it with Ctrl-C\n", line)
        assert url, line
        assert (remote(url[1], timeout=10)(IMAGES, PROMPTS).score > 0).all()
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
        assert server.returncode in (0, -signal.SIGINT, 130)
    finally:
        server.kill()
        _, err = server.communicate()
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jpgg"], "did you mean 'jpeg'?"),
        (["jpeg", "--set", "quality=3"], "no parameter 'quality'"),
        (["jpeg", "--host", "0.0.0.0"], "set ABLATE_REWARD_TOKEN"),
        (["jpeg", "--host", "192.0.2.1"], "set ABLATE_REWARD_TOKEN"),
        (["remote", "--set", "url=http://127.0.0.1:1", "--set", "retries=0"], "ConnectError"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(words: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.delenv("ABLATE_REWARD_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["ablate", "reward-server", *words, "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


# cells


def cell_with(reward: Any, **settings: Any) -> Cell:
    small = {
        "rollout.num_groups": 3,
        "rollout.group_size": 4,
        "rollout.num_steps": 5,
        "update.micro_batch_size": 16,
        "evaluation.num_prompts": 6,
        "evaluation.num_steps": 2,
        "evaluation.panel": [],
        "budget.epochs": 2,
        "export_weights": False,
        "reward": reward,
    }
    cells = make_plan(load_grid(GRIDS / "tiny.yaml", small | settings)).cells
    return next(
        cell for cell in cells if (cell.objective, cell.estimator, cell.sampler) == ("grpo", "elbo-simple", "ode")
    )


def remote_term(url: str) -> list[dict[str, Any]]:
    return [{"name": "remote", "url": url, "timeout": 5, "retries": 1, "backoff": 0.01, "token_env": "MY_TOKEN"}]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    return SECRET


def comparable(folder: Path) -> list[dict[str, float]]:
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if not k.startswith("cost/") and k != "device_hours"} for line in lines]


def test_a_cell_learns_the_same_from_a_reward_elsewhere(tmp_path: Path, token: str) -> None:
    local = folder_of(cell_with("scenes"), tmp_path / "local")
    assert train.train_cell(local).status is Status.DONE
    with reward_server("scenes", token=token) as url:
        cell = cell_with(remote_term(url))
        elsewhere = folder_of(cell, tmp_path / "elsewhere")
        run = set_up(elsewhere, cell, SD3Policy(cell.recipe.model, join().device))
        assert run.scorer._meanwhile  # overlaps with the rollout
        record = train.train_cell(elsewhere)
    assert (record.status, record.message) == (Status.DONE, "")
    assert record.rewards == {"remote": f"remote-1 {url} scenes-1"}
    assert comparable(elsewhere) == comparable(local)
    written = [path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()]
    assert not any(token.encode() in content for content in written)


def test_a_cell_whose_server_is_down_waits_for_it(tmp_path: Path, token: str) -> None:
    with reward_server("scenes", token=token) as url:
        pass
    folder = folder_of(cell_with(remote_term(url)), tmp_path)
    record = train.train_cell(folder)
    assert record.status is Status.REWARD_UNAVAILABLE
    assert "ablate reward-server" in record.message
    with reward_server("scenes", int(url.rsplit(":")[-1]), token=token):
        record = train.train_cell(folder)
    assert (record.status, record.attempts) == (Status.DONE, 2)


def test_a_cell_whose_server_dies_goes_on_when_it_is_back(tmp_path: Path, token: str, monkeypatch) -> None:
    whole = folder_of(cell_with("scenes", **{"budget.epochs": 3}), tmp_path / "whole")
    train.train_cell(whole)
    real, dying = train.train_epoch, threading.Event()

    def until_it_dies(run: Any) -> dict[str, float]:
        if run.progress.epoch == 1 and not dying.is_set():
            dying.set()
            server.__exit__(None, None, None)
        return real(run)

    monkeypatch.setattr(train, "train_epoch", until_it_dies)
    server = reward_server("scenes", token=token)
    url = server.__enter__()
    folder = folder_of(cell_with(remote_term(url), **{"budget.epochs": 3}), tmp_path / "parts")
    record = train.train_cell(folder)
    assert (record.status, record.epochs) == (Status.REWARD_UNAVAILABLE, 1)
    assert "no score for 3 of 3 groups" in record.message
    assert len(list((folder / "unscored").glob("*.png"))) == 12
    assert url in json.loads((folder / "unscored" / "epoch-1-0-0.jsonl").read_text().splitlines()[0])["reason"]
    with reward_server("scenes", int(url.rsplit(":")[-1]), token=token):
        record = train.train_cell(folder)
    assert (record.status, record.epochs, record.attempts) == (Status.DONE, 3, 2)
    assert comparable(folder) == comparable(whole)


def test_a_reward_more_patient_than_its_cell_is_no_plan() -> None:
    patient = {"name": "remote", "url": "http://192.0.2.1:8400", "max_seconds": 400}
    too_patient, together = [patient | {"max_seconds": 600}], [patient, patient | {"label": "b"}]
    for field, terms in (("reward", too_patient), ("reward", together), ("evaluation.panel", too_patient)):
        cell = cell_with(**({"reward": "scenes"} | {field: terms}))
        with pytest.raises(FieldError, match=r"max_seconds.*expected less than scoring.timeout, 600 s") as refused:
            identify(cell.recipe)
        assert ".".join(map(str, refused.value.location)) == field
    assert identify(cell_with(**{"reward": "scenes", "evaluation.panel": together}).recipe)  # each has its own time
    within = {"name": "pairwise", "reward": patient | {"max_seconds": 900}}
    with pytest.raises(FieldError, match="got 900 s of 'pairwise'"):
        identify(cell_with([within]).recipe)
    assert identify(cell_with([within], **{"scoring.timeout": 901}).recipe)


def test_a_remote_reward_is_planned_without_its_server() -> None:
    cell = cell_with(remote_term("http://192.0.2.1:8400/"))
    assert identify(cell.recipe)["reward"] == "remote-1 http://192.0.2.1:8400"
