import time

from trm_dist.elastic.pulse import Pulse


def test_node_is_healthy_until_a_worker_is_silent_for_twice_its_limit() -> None:
    pulse = Pulse.of_worker({}, slot=1, hang_timeout_s=0.1)
    assert pulse.health() == (True, {"batch_count": 0, "seconds_since_sign_of_life": 0})
    for batch_count in (7, 8):
        pulse.beat(batch_count)
    is_well, told = pulse.health()
    assert is_well
    assert told["batch_count"] == 8
    time.sleep(0.21)
    is_well, told = pulse.health()
    assert not is_well
    assert told["seconds_since_sign_of_life"] > 0.2
    pulse.beat()
    assert pulse.health()[0]
