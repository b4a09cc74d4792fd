"""Starts the ranks of a training stage, here or elsewhere, watches them, and never leaves one behind."""

from flows.launcher.launch import launch_ranks
from flows.launcher.outcome import NotSubmitted, Preempted, RankError, treat_as_preemption
from flows.launcher.rank import (
    EXIT_PREEMPTED,
    Heartbeat,
    asked_to_save,
    follow_parent,
    note_preemption,
    save_on_sigterm,
    speak_error,
)
from flows.launcher.sessions import STOP_GRACE_S, free_port, stop_sessions

__all__ = [
    "EXIT_PREEMPTED",
    "STOP_GRACE_S",
    "Heartbeat",
    "NotSubmitted",
    "Preempted",
    "RankError",
    "asked_to_save",
    "follow_parent",
    "free_port",
    "launch_ranks",
    "note_preemption",
    "save_on_sigterm",
    "speak_error",
    "stop_sessions",
    "treat_as_preemption",
]
