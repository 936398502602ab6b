# SPDX-License-Identifier: Apache-2.0
"""Reading model text in linear time: tags, chats, words, numbers, boxes, choices, mathematics."""
