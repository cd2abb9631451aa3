"""What the model reads is short, whole in its sense, and holds no id."""

from __future__ import annotations

import base64

import pytest

from sandbox_tools import errors
from sandbox_tools.models import Execution, Failure, Result
from sandbox_tools.tools.render import (
    IMAGE_LIMIT,
    IMAGES,
    TEXT_LIMIT,
    RetryableByModel,
    render,
    render_error,
    render_timeout,
)

PNG = base64.b64encode(b"\x89PNG not really").decode()


def text_of(rendered):
    return "\n".join(block["text"] for block in rendered.blocks if block["type"] == "text")


def images_of(rendered):
    return [block for block in rendered.blocks if block["type"] == "image"]


def test_long_output_keeps_its_beginning_and_its_end_and_says_what_is_left_out():
    text = text_of(render(Execution(stdout="a" * 50_000 + "end")))
    assert len(text) < TEXT_LIMIT + 200
    assert text.startswith("aaa")
    assert text.endswith("end")
    assert "30003 characters are left out" in text


def test_what_the_client_left_out_is_said_too():
    assert "7 characters of standard output" in text_of(render(Execution(stdout="x", stdout_omitted=7)))


def test_code_that_puts_nothing_out_is_said_to_have_run():
    assert text_of(render(Execution())) == "The code ran and put nothing out."


def test_a_traceback_comes_without_its_colours():
    failure = Failure(name="ValueError", value="no", traceback="\x1b[31mValueError\x1b[0m: no")
    rendered = render(Execution(failure=failure))
    assert text_of(rendered) == "ValueError: no"
    assert rendered.artifact["failure"] == "ValueError"


def test_a_plot_is_an_image_and_its_object_name_is_not_repeated():
    rendered = render(Execution(results=[Result(text="<Figure size 640x480>", png=PNG)]))
    assert [block["base64"] for block in images_of(rendered)] == [PNG]
    assert text_of(rendered) == ""


def test_more_images_than_a_model_should_get_are_said_in_words():
    rendered = render(Execution(results=[Result(png=PNG)] * (IMAGES + 2)))
    assert len(images_of(rendered)) == IMAGES
    assert text_of(rendered).count("left out") == 2


def test_an_image_that_is_too_large_is_said_in_words():
    rendered = render(Execution(results=[Result(png=base64.b64encode(b"x" * IMAGE_LIMIT).decode())]))
    assert images_of(rendered) == []
    assert "1.5 MB" in text_of(rendered)


def test_a_value_dropped_on_the_way_is_said_in_words():
    assert "70000000 bytes" in text_of(render(Execution(results=[Result(omitted_bytes=70_000_000)])))


def test_an_image_that_is_none_is_not_handed_on():
    assert images_of(render(Execution(results=[Result(png="no base64!")]))) == []


def test_a_frame_reads_as_text_and_a_bare_html_object_is_described():
    frame = Result(text="   a\n0  1", html="<table>", is_main_result=True)
    page = Result(text="<IPython.core.display.HTML object>", html="<b>bold</b>")
    text = text_of(render(Execution(results=[frame, page])))
    assert text.startswith("   a\n0  1")
    assert "HTML of 11 characters" in text
    assert "<table>" not in text


def test_the_artifact_holds_facts_on_images_and_no_bytes():
    rendered = render(Execution(results=[Result(png=PNG)]))
    assert PNG not in repr(rendered.artifact)
    assert rendered.artifact["images"][0]["bytes"] == 15


def test_a_timeout_says_that_state_is_kept_and_what_had_been_put_out():
    error = errors.ExecutionTimeoutError("late", partial=Execution(stdout="half"))
    text = text_of(render_timeout(error, 5))
    assert "after 5 s" in text
    assert "kept" in text
    assert text.endswith("half")


def every_error():
    found, todo = [], [errors.SandboxError]
    while todo:
        cls = todo.pop()
        found.append(cls)
        # The engine's own never leave its process: what crosses the wire is a status of the tree.
        todo.extend(each for each in cls.__subclasses__() if each.__module__ == errors.__name__)
    return found


FOR_THE_OPERATOR = {
    errors.SandboxError,
    errors.ConfigError,
    errors.ProtocolError,
    errors.APIError,
    errors.AuthenticationError,
    errors.AccessDeniedError,
    errors.NotFoundError,  # as one of a template, which is of no sandbox
    errors.ExecutionTimeoutError,  # `run_code` renders it where it knows the limit
    errors.CommandError,
    errors.EngineError,
}


def test_only_what_says_that_the_sandbox_is_gone_tells_the_model_so():
    for cls in every_error():
        if not issubclass(cls, (errors.StateLostError, errors.CommandError)):
            try:
                words = text_of(render_error(cls("not found", sandbox_id="i-secret")))
            except (RetryableByModel, errors.SandboxError) as error:
                words = str(error)
            assert issubclass(cls, errors.SandboxExpiredError) == ("sandbox is gone" in words)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_no_error_shows_the_model_an_id(cls):
    """Each error meets one of three fates; where its words reach the model, they are ours."""
    extra = {"lost": frozenset({"memory"})} if issubclass(cls, errors.StateLostError) else {}
    error = cls("sandbox i-secret is not well", **extra)
    try:
        words = text_of(render_error(error))
    except RetryableByModel as retry:
        words = str(retry)
    except errors.SandboxError:
        words = None
    assert (words is None) == (cls in FOR_THE_OPERATOR)
    assert "i-secret" not in (words or "")
