"""Judges: language models that grade answers, over the OpenAI chat protocol. A stage of its own: judging again never
generates again, and an answer that was judged is never paid for twice.

    questions.py     what is asked and what comes back: forms, questions, judgments
    replies.py       reading replies, strictly
    client.py        the endpoint: retries, structured output, usage
    budget.py        what may still be spent
    run.py           all questions of a run, with a cache
    calibration.py   how far the judge can be trusted
"""
