from __future__ import annotations

import itertools
import socket
from itertools import pairwise

import numpy as np
import pytest
import torch

from flows.export.parts import DecoderPart, _cuts, share_layers
from flows.export.shipped.messages import EndedError, receive, send
from flows.model.decoder import Decoder
from tests.serving import tiny_model


def test_no_other_cuts_make_the_largest_part_smaller() -> None:
    sizes = np.random.default_rng(0).integers(1, 50, 9).tolist()
    for parts in range(1, 6):

        def largest(cuts: tuple[int, ...]) -> int:
            return max(sum(sizes[first:behind]) for first, behind in pairwise((0, *cuts, len(sizes))))

        least = min(largest(cuts) for cuts in itertools.combinations(range(1, len(sizes)), parts - 1))
        assert largest(_cuts(sizes, parts)) == least


def test_parts_hold_every_layer_once_and_nothing_of_the_others() -> None:
    model = Decoder(tiny_model.changed(num_hidden_layers=5), tiny_model.VOCAB_SIZE)
    shares = share_layers(model, 3)
    parts = [DecoderPart(model, *share, number) for number, share in enumerate(shares)]
    assert [layer for part in parts for layer in part.layers] == list(model.model.layers)
    assert [(part.given, part.made) for part in parts] == [
        ("input_ids", "hidden_0"),
        ("hidden_0", "hidden_1"),
        ("hidden_1", "logits"),
    ]
    weights = [{id(one) for one in part.parameters()} for part in parts]
    tied = {id(model.lm_head.weight)}
    assert weights[0] & weights[2] == tied
    assert not weights[1] & (weights[0] | weights[2])
    assert set().union(*weights) == {id(one) for one in model.parameters()}
    x_BLD = torch.zeros(1, 2, 32)
    assert parts[1].enter(x_BLD) is x_BLD
    assert parts[1].leave(x_BLD, torch.zeros(1, dtype=torch.int64)) is x_BLD


def test_arrays_arrive_as_they_were_sent_and_an_end_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    message = {
        "ids": np.arange(6).reshape(2, 3)[:, ::2],
        "nothing": np.zeros((2, 0), np.int64),
        "codes": np.array([-3, 4], np.int8),
    }
    with theirs:
        with ours:
            send(ours, message)
            found = receive(theirs)
        with pytest.raises(EndedError):
            receive(theirs)
    assert found.keys() == message.keys()
    for name, array in message.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
