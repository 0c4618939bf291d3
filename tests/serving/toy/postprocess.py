"""The real stage over a tokenizer whose tokens are UTF-8 bytes."""

from ming_trt.serving.stages.postprocess import PostprocessStage


class Bytes:
    def decode_delta(self, context, tokens, final=False):
        def whole(ids):
            return bytes(ids).decode("utf-8", "ignore")

        return whole([*context, *tokens])[len(whole(context)) :]


class TritonPythonModel(PostprocessStage):
    def load(self):
        self.tokenizer = Bytes()
