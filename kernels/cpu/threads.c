/* Threads that share the items of one task at a time.
 *
 * Whoever is free takes the next item, and a task is done when its items are: a thread that the
 * system gives no core to delays nobody, where an OpenMP team would wait for it at every barrier.
 * With another busy process on two cores, that is the difference between half the speed and a
 * twentieth of it. Idle threads spin for some microseconds, which is as long as the pauses between
 * the tasks of a step, and then sleep.
 */
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef void (*Work)(const void *task, int64_t item);

typedef struct {
    /* The task's number in the high half, the next item in the low one: an item is taken by
     * counting it up, which fails for a task that is over. */
    _Atomic uint64_t ticket;
    _Atomic uint32_t items, finished;
    /* Rings for each task; what sleepers wait at. */
    _Atomic uint32_t bell, sleeping;
    _Atomic uint32_t closed, busy;
    _Atomic(Work) work;
    _Atomic(const void *) task;
    int64_t helpers;
    pthread_t threads[];
} Pool;

/* About 50 us of looking for work before a thread sleeps, or lets others have the core. */
enum { SPINS = 2000 };
static const uint32_t NO_ITEM = 0xffffffff;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_items(Pool *pool) {
    uint64_t ticket = atomic_load(&pool->ticket);
    const uint64_t number = ticket >> 32;
    const Work work = pool->work;
    const void *task = pool->task;
    const uint32_t items = atomic_load(&pool->items);
    /* What was read above is the task's if taking succeeds: it changes only between tasks. */
    while (ticket >> 32 == number && (uint32_t)ticket < items)
        if (atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) {
            work(task, (uint32_t)ticket);
            atomic_fetch_add(&pool->finished, 1);
            ticket = atomic_load(&pool->ticket);
        }
}

static void *help(void *argument) {
    Pool *pool = argument;
    for (uint32_t heard = 0;;) {
        for (int64_t spins = 0; atomic_load(&pool->bell) == heard; spins++) {
            if (spins < SPINS) {
                pause_briefly();
                continue;
            }
            atomic_fetch_add(&pool->sleeping, 1);
            syscall(SYS_futex, &pool->bell, FUTEX_WAIT_PRIVATE, heard, NULL, NULL, 0);
            atomic_fetch_sub(&pool->sleeping, 1);
        }
        heard = atomic_load(&pool->bell);
        if (atomic_load(&pool->closed)) return NULL;
        take_items(pool);
    }
}

static void ring(Pool *pool) {
    atomic_fetch_add(&pool->bell, 1);
    if (atomic_load(&pool->sleeping))
        syscall(SYS_futex, &pool->bell, FUTEX_WAKE_PRIVATE, pool->helpers, NULL, NULL, 0);
}

/* threads: with the caller's own. */
Pool *polydelta_open_pool(int64_t threads) {
    Pool *pool = calloc(1, sizeof *pool + threads * sizeof(pthread_t));
    for (pool->helpers = 0; pool->helpers < threads - 1; pool->helpers++)
        if (pthread_create(pool->threads + pool->helpers, NULL, help, pool)) break;
    return pool;
}

void polydelta_close_pool(Pool *pool) {
    atomic_store(&pool->closed, 1);
    ring(pool);
    for (int64_t i = 0; i < pool->helpers; i++) pthread_join(pool->threads[i], NULL);
    free(pool);
}

/* Does work(task, item) for every item, in any order. A caller that finds the pool at work for
 * another one does its task alone. */
static void share(Pool *pool, Work work, const void *task, int64_t items) {
    if (!pool->helpers || items < 2 || atomic_exchange(&pool->busy, 1)) {
        for (int64_t item = 0; item < items; item++) work(task, item);
        return;
    }
    const uint64_t number = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, (number - 1) << 32 | NO_ITEM);
    pool->work = work;
    pool->task = task;
    atomic_store(&pool->items, items);
    atomic_store(&pool->finished, 0);
    atomic_store(&pool->ticket, number << 32);
    ring(pool);
    take_items(pool);
    for (int64_t spins = 0; atomic_load(&pool->finished) < items; spins++)
        if (spins < SPINS)
            pause_briefly();
        else
            sched_yield();
    atomic_store(&pool->busy, 0);
}

/* A step that was recorded: its calls, in their order. */
typedef struct {
    void (*function)(Pool *pool, const void *task);
    const void *task;
} Call;

typedef struct {
    int64_t count;
    const Call *calls;
} Recording;

void polydelta_replay(Pool *pool, const Recording *recording) {
    for (int64_t i = 0; i < recording->count; i++)
        recording->calls[i].function(pool, recording->calls[i].task);
}
