"""How fast a run goes and when it will be over, in words for the sampler node."""

from statistics import median

from ..engine import StepReport

# The estimate follows the newest steps: blocks may have been compiled, or a GPU slowed down by its heat.
RECENT_STEPS = 5


class Pace:
    """Judges by the time of a forward, which is the same for both experts, where a step is one or two of them.

    Loading is no part of it. Neither is the first step once there is another: blocks are timed and compiled in it.
    """

    def __init__(self) -> None:
        self._forward_seconds: list[float] = []
        self._loading_seconds: dict[str, float] = {}

    def words(self, report: StepReport) -> str:
        """What to show once this step is done; to be called for each step in turn."""
        self._forward_seconds.append((report.seconds - report.loading_seconds) / report.forwards)
        usual = median((self._forward_seconds[1:] or self._forward_seconds)[-RECENT_STEPS:])
        line = f"Step {report.step} of {report.steps} ({report.expert}), {usual * report.forwards:.1f} s a step"
        if report.forwards_left:
            line += f", about {duration(usual * report.forwards_left)} left"
        if report.expert_to_come:
            line += f" and loading the {report.expert_to_come}"
        earlier = self._loading_seconds.get(report.expert, 0.0)
        self._loading_seconds[report.expert] = earlier + report.loading_seconds
        loads = [f"Loading the {expert} took {duration(seconds)}." for expert, seconds in self._loading_seconds.items() if seconds >= 0.5]
        return "\n".join((line, *loads))


def duration(seconds: float) -> str:
    """ "52 s", "3 min 20 s" or "1 h 45 min"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
