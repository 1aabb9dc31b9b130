"""Fixtures that several test files share."""

import pytest
from support.browser import Tab, open_browser
from support.studio_models import tiny_models
from support.studio_page import READY, names, serve_short_sounds
from support.studio_process import StudioProcess
from support.studio_server import Running


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, loaded once."""
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(tmp_path, models):
    """A server with an empty session."""
    running = Running(tmp_path, models)
    with running.http:
        yield running
    assert running.unexpected == []


@pytest.fixture(scope="module")
def browser():
    """Start a browser, shared by the tests of this module."""
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def program(trained, tmp_path_factory):
    """Start a studio with a tiny model."""
    program = StudioProcess(tmp_path_factory.mktemp("studio"), "--model", str(trained.checkpoint)).start()
    yield program
    program.close()


@pytest.fixture(scope="module")
def first_tab(browser):
    """An empty page, shared by the tests of this module because each new one takes a second."""
    tab = Tab(browser)
    serve_short_sounds(tab)
    yield tab
    tab.close()


@pytest.fixture
def page(browser, program, first_tab):
    """Return a function that opens the page, at first with a new session. No page may have errors at the end."""
    tabs = []
    first_tab.problems.clear()

    def opened(**options) -> Tab:
        tab = first_tab
        if tabs or options:
            tab = Tab(browser, **options)
            serve_short_sounds(tab)
        tabs.append(tab.open(program.address))
        tab.wait(READY)
        if len(tabs) == 1:
            name = next(names)
            tab.run(f"studio.send({{ type: 'new', name: '{name}' }})")
            tab.wait(f"studio.session.name === '{name}'")
            tab.run("studio.send({ type: 'settings', settings: { max_silence_seconds: 0.5, max_note_seconds: 1 } })")
        return tab

    yield opened
    for tab in tabs:
        assert [problem for problem in tab.problems if "ERR_CONNECTION_REFUSED" not in problem] == []
        if tab is first_tab:
            tab.page.goto("about:blank")
        else:
            tab.close()
