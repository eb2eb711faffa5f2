"""Tools of transfer attacks: borders, templates, input transformations, update rules.

Each trick of the transfer literature is one function with its formula and its paper, so that an
attack composes them; `attacks.transfer_caa` does.
"""
