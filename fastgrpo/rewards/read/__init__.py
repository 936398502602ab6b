"""Reading model text in linear time: tags, chats, words, numbers, boxes, choices, mathematics."""
