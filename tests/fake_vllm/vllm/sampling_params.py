"""Settings of requests, without checks."""


class SamplingParams:
    def __init__(self, structured_outputs, **settings):
        self.grammar = structured_outputs.grammar if structured_outputs is not None else None
        self.__dict__.update(settings)


class StructuredOutputsParams:
    def __init__(self, grammar):
        self.grammar = grammar
