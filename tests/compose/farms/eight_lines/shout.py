"""A model of eight lines."""

import time


class Shout:
    def setup(self, device):
        self.device = device

    def predict(self, request):
        time.sleep(request.get("seconds", 0))
        return {"said": request["text"].upper(), "device": self.device}
