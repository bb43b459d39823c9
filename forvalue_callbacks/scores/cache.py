"""Stub until the merge of h-writer."""


def load_state(file, shapes=None):
    return None


def save_state(file, arrays):
    pass
