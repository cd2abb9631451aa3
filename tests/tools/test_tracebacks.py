"""Of a traceback the model reads its own frames and the error, and how much lies between."""

from __future__ import annotations

from sandbox_tools.tools.tracebacks import trimmed

PANDAS = """\
KeyError                                  Traceback (most recent call last)
File /usr/local/lib/python3.11/dist-packages/pandas/core/indexes/base.py:3816, in Index.get_loc(self, key)
   3815 try:
-> 3816     return self._engine.get_loc(casted_key)

File pandas/_libs/index.pyx:172, in pandas._libs.index.IndexEngine.get_loc()
--> 172 'Could not get source, probably due dynamically evaluated source code.'
KeyError: 'b'

The above exception was the direct cause of the following exception:

KeyError                                  Traceback (most recent call last)
Cell In[1], line 3
      1 import pandas as pd
----> 3 f(pd.DataFrame({'a':[1]}))

Cell In[1], line 2, in f(d)
----> 2 def f(d): return d['b']

File /usr/local/lib/python3.11/dist-packages/pandas/core/frame.py:4330, in DataFrame.__getitem__(self, key)
   4326 \n   (...)    4328
-> 4330             indexer = self.columns.get_loc(key)

File /home/user/mine.py:7, in own(x)
      7 raise

KeyError: 'b'"""


def test_frames_of_libraries_are_left_out_and_counted() -> None:
    assert (
        trimmed(PANDAS)
        == """\
KeyError                                  Traceback (most recent call last)
[2 frames of libraries left out]

KeyError: 'b'

The above exception was the direct cause of the following exception:

KeyError                                  Traceback (most recent call last)
Cell In[1], line 3
      1 import pandas as pd
----> 3 f(pd.DataFrame({'a':[1]}))

Cell In[1], line 2, in f(d)
----> 2 def f(d): return d['b']

[1 frame of libraries left out]
File /home/user/mine.py:7, in own(x)
      7 raise

KeyError: 'b'"""
    )


def test_a_traceback_of_ones_own_code_is_whole() -> None:
    own = (
        "ZeroDivisionError  Traceback (most recent call last)\nCell In[2], line 1\n----> 1 1/0\n\nZeroDivisionError: no"
    )
    assert trimmed(own) == own


def test_a_syntax_error_and_words_of_other_languages_stay_as_they_are() -> None:
    for text in ("  Cell In[5], line 1\n    x = (\n         ^\nSyntaxError: incomplete input", "bash: no such file"):
        assert trimmed(text) == text


def test_colours_go() -> None:
    assert trimmed("\x1b[31mValueError\x1b[0m: no") == "ValueError: no"


def test_an_error_text_that_looks_like_a_frame_of_a_library_is_not_lost() -> None:
    text = "Cell In[2], line 1\n----> 1 f()\n\nValueError: bad line\n  12 is wrong\nFile is missing"
    assert trimmed(text) == text
