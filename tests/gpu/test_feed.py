"""Micro-batches that are copied to a GPU ahead of their turn: their values, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from launcher.training.data import feed
from tests.gpu.jobs import DEVICE, IS_REHEARSAL
from tests.training.test_feed import fed, gone_through


@pytest.mark.parametrize("most", [feed._MOST_BYTES, 8])
def test_copies_of_another_stream_arrive(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """By a stream of their own, or in their turn where they are large."""
    monkeypatch.setattr(feed, "goes_ahead", lambda device: True)
    monkeypatch.setattr(feed, "_MOST_BYTES", most)
    expected = gone_through(fed()[0])
    assert gone_through(fed(torch.device(DEVICE))[0]) == expected


@pytest.mark.skipif(IS_REHEARSAL, reason="a CPU has nothing to wait for")
def test_the_pass_does_not_wait_for_them() -> None:
    """Each wait of the main thread is an error."""
    one, _, _ = fed(torch.device(DEVICE))
    step_batch = one.step(0)
    one.batch(0, 0, step_batch)
    one.rest()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.batch(0, 1, step_batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
