"""A vLLM engine that answers requests read from stdin, one JSON object a line, on stdout.

Run by kick's `vllm` LM in an interpreter that has vLLM and need not have kick: nothing but vLLM and Python is imported.
The first line is {"engine": arguments of vllm.LLM}; then come {"score": ...} and {"complete": ...}. Each gets one line
back, {"result": ...} or {"error": ...}; "ended" says whether the engine, whose processes are its own, answers no more.
"""

import json
import os
import signal
import sys

MOST_TOKENS = 128  # whose log-probabilities vLLM gives for one token


def main():
    end_with_parent(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is not an answer

    def reply(**answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        import vllm

        engine = vllm.LLM(**json.loads(sys.stdin.readline())["engine"])
        reply(result={"vllm": vllm.__version__, "context": engine.llm_engine.model_config.max_model_len})
    except Exception as error:  # told to the process that asked
        reply(error=f"{type(error).__name__}: {error}")
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            work = score if "score" in request else complete
            reply(result=work(engine, **request.popitem()[1]))
        except Exception as error:  # likewise
            ended = any(kind.__name__ == "EngineDeadError" for kind in type(error).__mro__)
            reply(error=f"{type(error).__name__}: {error}", ended=ended)
            if ended:
                return


def end_with_parent(pipe):
    """End all processes of this group once nobody holds the other end of `pipe`, however that came to be.

    An engine that hangs does not see it, and its own children outlive it: so a process is set to watch.
    """
    if os.fork() == 0:
        for own in (0, 1, 2):
            os.close(own)
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)
    os.close(pipe)


def score(engine, contexts, options):
    """What may follow each context. options: for each context lists of tokens.

    For each context and option (log-likelihood, is it greedy). Where all options of a context are single tokens, one
    token is generated and their log-probabilities are asked for: that shares prefixes, which prompt log-probabilities
    do not.
    """
    from vllm import SamplingParams

    results = [[(0.0, False)] * len(own) for own in options]
    prompts, parameters, places = [], [], []
    for index, (context, own) in enumerate(zip(contexts, options, strict=True)):
        tokens = sorted({option[0] for option in own})
        single = all(len(option) == 1 for option in own) and hasattr(SamplingParams(), "logprob_token_ids")
        if single and len(tokens) <= MOST_TOKENS:
            prompts.append({"prompt_token_ids": context})
            parameters.append(SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=tokens, detokenize=False))
            places.append((index, -1))
            continue
        for number, option in enumerate(own):
            prompts.append({"prompt_token_ids": context + option})
            parameters.append(SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False))
            places.append((index, number))
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    for output, (index, number) in zip(outputs, places, strict=True):
        if number < 0:
            generated = output.outputs[0]
            found = generated.logprobs[0]
            for place, (token,) in enumerate(options[index]):
                results[index][place] = (found[token].logprob, generated.token_ids[0] == token)
        else:
            option = options[index][number]
            last = output.prompt_logprobs[-len(option) :]
            found = [own[token] for own, token in zip(last, option, strict=True)]
            results[index][number] = (sum(each.logprob for each in found), all(each.rank == 1 for each in found))
    return results


def complete(engine, contexts, parameters):
    """The tokens that follow each context, without one that ends them."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": context} for context in contexts]
    outputs = engine.generate(prompts, [SamplingParams(**own) for own in parameters], use_tqdm=False)
    return [made(output.outputs[0]) for output in outputs]


def made(completion):
    """The tokens of a completion: one that ends it is no part of it; with a stop string it is."""
    ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    return list(completion.token_ids[:-1] if ended else completion.token_ids)


if __name__ == "__main__":
    main()
