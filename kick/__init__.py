"""kick: what did a compressed language model lose, and how sure are we?"""

__version__ = "0.2.0"
