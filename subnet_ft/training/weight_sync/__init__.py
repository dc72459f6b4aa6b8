"""Generation engines get the values of the trained weights only: the mask once, then K values per sync."""

from subnet_ft.training.weight_sync.channels import GroupChannel, HTTPChannel, receive, respond
from subnet_ft.training.weight_sync.message import Acknowledgement, Opening, ValuesUpdate
from subnet_ft.training.weight_sync.receiver import ValuesReceiver
from subnet_ft.training.weight_sync.sender import Channel, ValuesSender
from subnet_ft.training.weight_sync.sync import sync_values_only

__all__ = [
    "Acknowledgement",
    "Channel",
    "GroupChannel",
    "HTTPChannel",
    "Opening",
    "ValuesReceiver",
    "ValuesSender",
    "ValuesUpdate",
    "receive",
    "respond",
    "sync_values_only",
]
