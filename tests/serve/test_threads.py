"""The threads that models compute in."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from raybert.serve.runtime.batching import ModelThreads, run_in_new_thread, use_threads
from raybert.serve.runtime.serial_executor import NewThreadExecutor


def seen():
    return threading.current_thread(), torch.get_num_threads()


def test_run_in_new_thread_leaves_no_thread_behind():
    before = torch.get_num_threads()
    thread, threads = run_in_new_thread(seen, before + 1)
    assert threads == before + 1 and not thread.is_alive()
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        run_in_new_thread(lambda: 1 / 0, None)


def test_tasks_run_one_after_another_each_in_a_thread_of_its_own():
    at_once, most, threads = 0, 0, []

    def task(number):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threads.append(threading.current_thread())
        time.sleep(0.01)
        at_once -= 1
        return number

    with NewThreadExecutor("executor", 1) as executor:
        assert [f.result() for f in [executor.submit(task, i) for i in range(5)]] == list(range(5))
        assert most == 1 and len(set(threads)) == 5
        assert not any(thread.is_alive() for thread in threads)


def test_work_is_warmed_up_with_all_cores_and_with_a_share():
    workers, counts = ModelThreads(4), []
    workers.warm_up(lambda: counts.append(torch.get_num_threads()))
    assert sorted(counts) == [1, 4] and workers.count == 4
    workers.close()


def test_a_thread_keeps_its_number_when_others_change_theirs():
    with ThreadPoolExecutor(1, initializer=use_threads, initargs=(3,)) as mine:
        mine.submit(time.monotonic).result()  # the thread has started
        run_in_new_thread(seen, 1)
        assert mine.submit(seen).result()[1] == 3
