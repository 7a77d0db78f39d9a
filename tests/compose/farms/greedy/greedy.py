class Greedy:
    """Takes more memory than the container may have."""

    def setup(self, device):
        self.kept = b"x" * (4 << 30)

    def predict(self, request):
        return len(self.kept)
