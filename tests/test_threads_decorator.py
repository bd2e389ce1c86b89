"""`num_threads` as a decorator: it holds while a function's body runs, or is refused."""

import asyncio
import functools
import threading

import pytest

from bnfast import get_num_threads, num_threads

HERE = get_num_threads()
ASKED = HERE + 1


def seen(*_, **__):
    return get_num_threads()


class TestFunctions:
    def test_it_holds_while_the_body_runs(self):
        @num_threads(ASKED)
        def seen_twice(a, *, b):
            """Look."""
            return a, b, seen()

        assert seen_twice(1, b=2) == (1, 2, ASKED)
        assert seen() == HERE
        assert (seen_twice.__name__, seen_twice.__doc__) == ("seen_twice", "Look.")

    def test_it_ends_with_an_exception(self):
        @num_threads(ASKED)
        def fail():
            raise KeyError(seen())

        for _ in range(2):
            with pytest.raises(KeyError, match=str(ASKED)):
                fail()
            assert seen() == HERE

    def test_calls_nest(self):
        @num_threads(ASKED)
        def outer():
            return [seen(), num_threads(1)(seen)(), seen()]

        assert outer() == [ASKED, 1, ASKED]

    def test_recursion(self):
        @num_threads(ASKED)
        def down(n):
            return [seen()] + (down(n - 1) if n else [])

        assert down(3) == [ASKED] * 4
        assert seen() == HERE

    def test_threads_do_not_disturb_one_another(self):
        meeting, found = threading.Barrier(2, timeout=20), {}

        @num_threads(ASKED)
        def look(name):
            meeting.wait()
            found[name] = seen()
            meeting.wait()

        threads = [threading.Thread(target=look, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"a": ASKED, "b": ASKED}

    @pytest.mark.parametrize(
        "function",
        [
            lambda: seen(),  # noqa: PLW0108
            functools.partial(seen, 1),
            functools.lru_cache(seen),
            type("Callable", (), {"__call__": seen})(),
        ],
        ids=["lambda", "partial", "cache", "object"],
    )
    def test_any_callable(self, function):
        assert num_threads(ASKED)(function)() == ASKED
        assert seen() == HERE

    def test_functions_written_in_c(self):
        assert num_threads(ASKED)(len)([3]) == 1

    def test_methods_of_all_kinds(self):
        class Model:
            @num_threads(ASKED)
            def run(self):
                return self, seen()

            @classmethod
            @num_threads(ASKED)
            def of_class(cls):
                return cls, seen()

            @staticmethod
            @num_threads(ASKED)
            def alone(x):
                return x, seen()

        model = Model()
        assert model.run() == (model, ASKED)
        assert model.of_class() == (Model, ASKED)
        assert model.alone(3) == (3, ASKED)


async def coroutine():
    return seen()


def generator():
    yield seen()


async def asynchronous_generator():
    yield seen()


class Asynchronous:
    async def __call__(self):
        return seen()


class TestDeferredFunctions:
    @pytest.mark.parametrize(
        ("function", "kind"),
        [
            (coroutine, "a coroutine function"),
            (generator, "a generator function"),
            (asynchronous_generator, "an asynchronous generator function"),
            (functools.partial(coroutine), "a coroutine function"),
            (functools.partial(generator), "a generator function"),
            (Asynchronous(), "a coroutine function"),
            (Asynchronous().__call__, "a coroutine function"),
        ],
    )
    def test_refused_at_decoration(self, function, kind):
        with pytest.raises(
            TypeError, match=rf"{kind}, whose body runs after the call .*; expected"
        ):
            num_threads(ASKED)(function)

    @pytest.mark.parametrize(
        "thing", [Asynchronous, staticmethod(seen), classmethod(seen), 3, None]
    )
    def test_not_a_function_refused(self, thing):
        with pytest.raises(TypeError, match=r"num_threads decorates .*; expected a function"):
            num_threads(ASKED)(thing)

    def test_block_in_body_works(self):
        async def look():
            with num_threads(ASKED):
                inside = seen()
            await asyncio.sleep(0)
            return inside, seen()

        async def both():
            return await asyncio.gather(look(), look())

        assert asyncio.run(both()) == [(ASKED, HERE)] * 2

        def looks():
            for _ in range(2):
                with num_threads(ASKED):
                    inside = seen()
                yield inside

        assert [(inside, seen()) for inside in looks()] == [(ASKED, HERE)] * 2


class TestBlocks:
    def test_one_after_the_other(self):
        block = num_threads(ASKED)
        for _ in range(2):
            with block:
                assert seen() == ASKED
            assert seen() == HERE

    def test_block_inside_itself_refused(self):
        """The outer number would be forgotten."""
        block = num_threads(ASKED)
        with block, pytest.raises(RuntimeError, match="is in use"):
            block.__enter__()
        assert seen() == HERE
