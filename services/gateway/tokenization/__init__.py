"""What is read of a model's folder, and what turns text and chats into tokens."""
