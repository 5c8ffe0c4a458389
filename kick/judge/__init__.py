"""Judges: language models that grade answers, over the OpenAI chat protocol. A stage of its own: judging again never
generates again, and an answer that was judged is never paid for twice.

    questions.py     what is asked and what comes back: forms, questions, judgments
    replies.py       reading replies, strictly
    client.py        the endpoint: retries, structured output, usage
    budget.py        what may still be spent
    cache.py         replies that were paid for, by the content of their questions
    run.py           all questions of a run
    estimate.py      what a judge would be asked, and what that costs
    spec.py          the `judge` section of a sweep file
    trust.py         how far the judge can be trusted
"""
