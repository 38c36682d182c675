"""The rooms behind `lora_scripts.data.conversations`: from a file's bytes to checked messages.

`rows` reads the kinds of file, `forms` tells by its fields what form a row has, `turns` reads and
checks the messages, `saying` holds the words for what is wrong.
"""
