"""Small factorisations take one BLAS thread; the randomised SVD takes as few products as it can."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from threadpoolctl import threadpool_info

from lora.blas import one_thread
from lora.card import LoRACard, LowRank
from lora.factors import leading_svd
from lora.merging import merge
from lora.testing.plugin import requirement

WIDE, NARROW = 530, 515


def factors(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(WIDE, 3)), rng.normal(size=(3, NARROW))


class Counted(np.ndarray):
    """An array of 530 columns or rows that counts its products."""

    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if ufunc is np.matmul and WIDE in np.shape(inputs[0]):
            Counted.products += 1
        inputs = [np.asarray(each) for each in inputs]
        return getattr(ufunc, method)(*inputs, **options)


@requirement("R16.7")
def test_what_is_found_at_once_takes_two_products_a_side():
    """Products are counted: each further step would cost two."""
    a, b = factors(0)
    Counted.products = 0
    leading_svd((a @ b).T.view(Counted), 3, 8, np.random.default_rng(0), 1e-3)
    assert Counted.products == 4


def blas_threads():
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


@requirement("R20.4")
def test_blas_has_its_threads_back_whoever_factorises_when():
    before = blas_threads()

    def work(number):
        for _ in range(50):
            with suppress(ZeroDivisionError), one_thread():
                assert number or blas_threads() == {1}
                raise ZeroDivisionError
            merge([LoRACard("docs", 3, 1.0, ["q"], {"q": LowRank(*factors(number), 1.0)})])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work, 0).result()
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(work, number) for number in (1, 2, 3)]:
            future.result()
    assert blas_threads() == before
