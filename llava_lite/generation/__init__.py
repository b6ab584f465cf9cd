"""One loop for answers, streams, batches, chats and scores. Start reading at loop.py."""
