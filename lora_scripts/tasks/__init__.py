"""What is trained: the meeting point of data, model and loss, behind one protocol."""
