"""The dashboard without a browser: its queue of work, its server, and what Explore draws."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from dash import dcc
from dash.development.base_component import Component
from small_runs import make_board, write_run

import rt_lens as rtl
from rt_lens.apps.dashboard.app import make_app
from rt_lens.apps.dashboard.explore import OPERATORS, SLOTS, _PromptJob, layout, prompt_of, steering
from rt_lens.apps.dashboard.serving import Dashboard
from rt_lens.apps.dashboard.session import Session
from rt_lens.apps.dashboard.work import Job, Jobs, progress_text, turn_of
from rt_lens.common.progress import Bar, watched
from rt_lens.models.generation import as_chat
from rt_lens.models.tokens.batches import encode


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    queue = Jobs(nullcontext())
    yield queue
    queue.close()


class Gate:
    """Work that goes on until it is let through or stopped."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> None:
        for _ in Bar(range(100_000), desc="waiting at the gate", unit="look", disable=True):
            self.begun.set()
            if self.open.wait(0.005):
                return


def ended(jobs: Jobs, key: str) -> Job:
    """The job, once it is through."""
    last = threading.Event()
    jobs.start("waiting", lambda job: last.set())
    assert last.wait(20)
    job = jobs.get(key)
    assert job is not None
    return job


def test_jobs_run_one_after_the_other_and_show_what_they_find(jobs):
    gate, order = Gate(), list[str]()

    def second(job: Job) -> None:
        order.append("second")
        job.show("answer", 1)
        job.show("answer", 2)

    first = jobs.start("first", gate)
    after = jobs.start("second", second)
    assert gate.begun.wait(20)
    assert order == [] and progress_text(jobs.get(after), jobs.before(jobs.get(after))) == "Waiting for 1 job."
    assert re.fullmatch(r"First … waiting at the gate: \d+ of 100000 looks", progress_text(jobs.get(first), []))
    gate.open.set()
    job = ended(jobs, after)
    assert jobs.get(first).state == job.state == "done" and progress_text(job, []) == "Done."
    assert job.shown == {"answer": 2} and job.versions == {"answer": 2}


def test_a_stopped_job_ends_and_one_that_waits_never_begins(jobs):
    gate, begun = Gate(), list[Job]()
    running, waiting = jobs.start("one", gate), jobs.start("two", begun.append)
    assert gate.begun.wait(20)
    jobs.stop(waiting)
    jobs.stop(running)
    assert ended(jobs, running).state == jobs.get(waiting).state == "stopped"
    assert begun == [] and progress_text(jobs.get(running), []) == "Stopped."


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (ValueError("layer must be 0 to 29, got 31."), "layer must be 0 to 29, got 31."),
        (MemoryError("Lower batch_size."), "Lower batch_size."),
        (SystemExit("bye"), "SystemExit: bye (unexpected; see the terminal of the dashboard)"),
        (RuntimeError("odd"), "RuntimeError: odd (unexpected; see the terminal of the dashboard)"),
    ],
)
def test_a_fault_is_told_and_the_queue_goes_on(jobs, fault, said):
    def fails(job: Job) -> None:
        raise fault

    job = ended(jobs, jobs.start("failing", fails))
    assert (job.state, job.error) == ("failed", said)


def test_two_dashboards_take_turns_on_one_model(tiny):
    first, second, gate = Jobs(turn_of(tiny)), Jobs(turn_of(tiny)), Gate()
    key = first.start("first", gate)
    assert gate.begun.wait(20)
    other = second.start("second", lambda job: job.show("turn", gate.open.is_set()))
    gate.open.set()
    assert ended(second, other).shown == {"turn": True}, "it starts after the first has ended"
    assert ended(first, key).state == "done"
    first.close()
    second.close()


def test_old_jobs_are_forgotten_and_unknown_ones_are_none(jobs):
    keys = [jobs.start("quick", lambda job: None) for _ in range(100)]
    ended(jobs, keys[-1])
    ended(jobs, jobs.start("one more", lambda job: None))
    assert jobs.get(keys[0]) is None and jobs.get(None) is None
    jobs.stop("never there")


def test_closing_ends_what_runs_and_what_waits():
    jobs, gate, begun = Jobs(nullcontext()), Gate(), list[Job]()
    running, waiting = jobs.start("one", gate), jobs.start("two", begun.append)
    assert gate.begun.wait(20)
    jobs.close()
    assert jobs.get(running).state == jobs.get(waiting).state == "stopped" and begun == []


@pytest.fixture
def board(tiny: Any, tiny_vectors: rtl.SteeringVectors) -> Iterator[Dashboard]:
    served = rtl.dashboard(tiny, tiny_vectors)
    yield served
    served.stop()


def port_of(board: Dashboard) -> int:
    return int(board.url.rsplit(":", 1)[1].strip("/"))


def answer(board: Dashboard, host: str | None = None, path: str = "/") -> http.client.HTTPResponse:
    port = port_of(board)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    return connection.getresponse()


def test_it_listens_on_this_machine_alone(board):
    assert answer(board).status == 200
    # All of 127.0.0.0/8 is this machine too: a server on every address would answer there.
    with pytest.raises(OSError, match="refused|unreachable|timed out|assign"):
        socket.create_connection(("127.0.0.2", port_of(board)), timeout=2)


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:{}", 200), ("127.0.0.1:{}", 200), ("evil.example:{}", 400), ("evil.example", 400)]
)
def test_a_name_that_was_made_to_point_here_is_refused(board, host, status):
    assert answer(board, host.format(port_of(board))).status == status


def test_another_site_cannot_start_work(board):
    """A form or a plain fetch of another origin may send text, but no JSON without being allowed to."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(board), timeout=20)
    listed = json.loads(answer(board, path="/_dash-dependencies").read())
    (visit,) = [each for each in listed if "visited.data" in each["output"]]
    asked = {
        "output": visit["output"],
        "outputs": [
            dict(zip(("id", "property"), each.split("."), strict=True))
            for each in visit["output"].strip(".").split("...")
        ],
        "inputs": [{**each, "value": "/vectors"} for each in visit["inputs"]],
        "state": [{**each, "value": []} for each in visit["state"]],
        "changedPropIds": ["url.pathname"],
    }
    found = {}
    for kind in ("application/json", "text/plain"):
        connection.request("POST", "/_dash-update-component", body=json.dumps(asked), headers={"Content-Type": kind})
        response = connection.getresponse()
        found[kind] = (response.status, b"vectors-start" in response.read())
    assert found["application/json"] == (200, True), "the very same request of a page of ours"
    assert found["text/plain"] == (415, False)
    connection.request("OPTIONS", "/_dash-update-component", headers={"Origin": "https://evil.example"})
    assert connection.getresponse().getheader("Access-Control-Allow-Origin") is None


def test_the_frame_asks_for_nothing_from_outside_and_forbids_it(board):
    response = answer(board)
    policy = response.getheader("Content-Security-Policy")
    page = response.read().decode()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    sources = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
    assert len(sources) > 5 and all(source.startswith(("/", "#")) for source in sources)
    assert '<html lang="en">' in page
    assert answer(board, path="/assets/style.css").status == answer(board, path="/assets/names.js").status == 200


def test_a_port_is_taken_freed_and_taken_again(board, tiny, tiny_vectors):
    port = port_of(board)
    with pytest.raises(ValueError, match=f"port {port} is not available .Address already in use.. Give another"):
        rtl.dashboard(tiny, tiny_vectors, port=port)
    beside = rtl.dashboard(tiny, tiny_vectors)
    assert port_of(beside) != port and answer(beside).status == 200
    own = port_of(beside)
    beside.stop()
    with pytest.raises(ConnectionRefusedError):
        answer(beside)
    again = rtl.dashboard(tiny, tiny_vectors, port=own)
    assert again.url == beside.url and answer(again).status == 200
    again.stop()


def test_waiting_ends_with_the_server(tiny, tiny_vectors):
    board = rtl.dashboard(tiny, tiny_vectors)
    waiter = threading.Thread(target=board.wait)
    waiter.start()
    board.stop()
    waiter.join(20)
    assert not waiter.is_alive()


def test_a_notebook_shows_it_in_a_frame(board):
    assert f'<iframe src="{board.url}"' in board._repr_html_() and repr(board) == f"Dashboard({board.url})"


def test_what_cannot_be_opened_is_refused_before_anything_is(tiny_vectors, model, tmp_path):
    with pytest.raises(ValueError, match="model or run must be given, got neither. Give a model"):
        rtl.dashboard()
    with pytest.raises(ValueError, match="d_model 32"):
        rtl.dashboard(model, tiny_vectors)
    with pytest.raises(FileNotFoundError, match="no_run"):
        rtl.dashboard(run=tmp_path / "no_run")


def ids(part: Any) -> dict[str, Component]:
    """All parts of a page that have an id."""
    found = {part.id: part} if isinstance(getattr(part, "id", None), str) else {}
    inside = getattr(part, "children", None)
    for child in inside if isinstance(inside, list | tuple) else [inside] if isinstance(inside, Component) else []:
        found |= ids(child)
    return found


@pytest.fixture
def explored(tiny: Any, tiny_vectors: rtl.SteeringVectors) -> Callable[..., Job]:
    """Runs what the button of Explore starts, in this thread."""

    def run(
        prompt: str = "Hello there.", operator: str = "add", arm: str = "none", session: Session | None = None
    ) -> Job:
        own = session or Session(tiny, {"mood": tiny_vectors})
        job = Job("answering", "key", lambda job: None)
        _PromptJob(own, prompt, "mood", operator, 1, 2.0, arm, 6).run(job)
        return job

    return run


def figure(job: Job, slot: str) -> Any:
    (held,) = [part for part in ids(job.shown[slot]).values() if isinstance(part, dcc.Graph)]
    return held.figure


def texts(job: Job) -> list[str]:
    return [article.children[1].children for article in job.shown["answers"].children]


@pytest.mark.parametrize("operator", OPERATORS)
def test_explore_draws_and_answers_what_the_api_gives(explored, tiny, tiny_vectors, operator):
    job = explored(operator=operator)
    hooks = steering(tiny_vectors, operator, 1, 2.0)
    (text,) = as_chat(tiny, ["Hello there."])
    wanted, replies = [], []
    for worn in ([], hooks):
        with tiny.hooks(fwd_hooks=worn):
            wanted.append(rtl.token_projections(tiny, tiny_vectors, text)[1].numpy())
            replies += rtl.generate(tiny, ["Hello there."], max_new_tokens=6)
    untuned, steered, difference = figure(job, "map").data
    np.testing.assert_allclose(untuned.z, wanted[0], atol=1e-4)
    np.testing.assert_allclose(steered.z, wanted[1], atol=1e-4)
    np.testing.assert_allclose(difference.z, wanted[1] - wanted[0], atol=1e-4)
    assert np.abs(difference.z).max() > 0.1
    np.testing.assert_allclose(figure(job, "words").data[1].customdata, wanted[1][1], atol=1e-4)
    assert texts(job) == [reply or "(nothing)" for reply in replies]
    assert set(job.shown) == set(SLOTS)


def test_the_operators_of_the_page_are_those_of_the_api(tiny, tiny_vectors):
    (vector,) = tiny_vectors.at_layers([1]).values()
    wanted = {
        "add": rtl.add(tiny_vectors, [1], 2.0),
        "add_preserving_norm": rtl.steering.add_preserving_norm(tiny_vectors, [1], 2.0),
        "ablate": rtl.ablate(tiny_vectors, [1], multiplier=2.0),
        "clamp": rtl.clamp(tiny_vectors, [1], 2.0 * float(vector.norm())),
    }
    assert set(wanted) == set(OPERATORS)
    for operator, hooks in wanted.items():
        projected = []
        for worn in (hooks, steering(tiny_vectors, operator, 1, 2.0)):
            with tiny.hooks(fwd_hooks=worn):
                projected.append(rtl.token_projections(tiny, tiny_vectors, "Some words.")[1])
        np.testing.assert_allclose(projected[0], projected[1], atol=1e-5)


def test_a_tuned_arm_answers_as_well(explored, tiny, tiny_vectors):
    session, noise = Session(tiny, {"mood": tiny_vectors}), np.random.default_rng(0)
    name, weight = next((name, own) for name, own in tiny.named_parameters() if name.endswith("mlp.W_out"))
    change = weight.new_tensor(noise.normal(0, 0.5, weight.shape))
    delta = rtl.WeightDelta({name: change}, "tiny", {}, [])
    session.keep_delta("rep_tuned_away", delta)
    job = explored(arm="rep_tuned_away", session=session)
    with delta.applied(tiny):
        (reply,) = rtl.generate(tiny, ["Hello there."], max_new_tokens=6)
    assert [article.children[0].children for article in job.shown["answers"].children][2] == "rep_tuned, away"
    assert texts(job)[2] == reply
    assert "rep_tuned_away" in [option["value"] for option in ids(layout(session))["explore-arm"].options]


def test_a_conversation_is_read_from_json_and_answered_as_by_the_api(explored, tiny):
    turns = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    turns.append({"role": "user", "content": "How are you?"})
    prompt = prompt_of(json.dumps(turns))
    assert prompt.messages == tuple(turns)
    assert texts(explored(prompt))[0] == rtl.generate(tiny, [turns], max_new_tokens=6)[0]
    assert prompt_of("[sic] a plain message") == "[sic] a plain message"
    with pytest.raises(ValueError, match=r"or a conversation as a JSON list .*got another list \(Unterminated"):
        prompt_of('[{"role": "user", "content": "cut')
    with pytest.raises(ValueError, match="prompt: message 1 must have a role"):
        prompt_of('[{"role": "robot", "content": "x"}]')


def test_a_prompt_too_long_to_draw_is_refused(explored, tiny):
    n = len(encode(tiny, as_chat(tiny, ["rain " * 500])[0]))
    with pytest.raises(ValueError, match=f"prompt must have at most 400 tokens with the chat template, got {n}"):
        explored("rain " * 500)


def test_stopping_leaves_no_hook(tiny, tiny_vectors, hooks_on, jobs):
    before, looks = hooks_on(tiny), list[int]()
    look = _PromptJob(Session(tiny, {"mood": tiny_vectors}), "Hello there.", "mood", "add", 1, 2.0, "none", 120)

    def run(job: Job) -> None:
        def watch(step: Any) -> None:
            looks.append(len(hooks_on(tiny)))
            if len(looks) == 20:
                job.stop.set()
            Job.watch(job, step)

        with watched(watch):
            look.run(job)

    job = ended(jobs, jobs.start("answering", run))
    assert job.state == "stopped" and max(looks) > len(before)
    assert hooks_on(tiny) == before


def test_explore_without_the_model_shows_the_run_and_says_why(tmp_path):
    session = Session(None, {}, rtl.load_results(write_run(tmp_path / "run", make_board(0))))
    page = layout(session)
    assert "explore-start" not in ids(page)
    assert "tiny is not on this machine, so you cannot type a prompt here." in str(page)
    held = page.children[-1]
    np.testing.assert_allclose(held.children.figure.data[0].z, [[0.1, 0.2]])


def test_each_page_has_its_place_in_the_frame(tiny, tiny_vectors):
    frame = ids(make_app(Session(tiny, {"mood": tiny_vectors})).layout)
    assert {f"page-{name}" for name in ("explore", "vectors", "steering", "tuning", "compare")} <= set(frame)
