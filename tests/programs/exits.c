// Threads end all the time: joined ones, and ones that die holding robust mutexes that lie in large protected memory.
// The kernel's stores at thread exit (clear_child_tid, OWNER_DIED) must not be lost, or a join or lock hangs for ever.
#include "target.h"

#include <sys/mman.h>

static struct {
    pthread_mutex_t *mutexes; // one a page, over a large region
    uint64_t n_mutexes;
    _Atomic uint64_t joined;
    _Atomic uint64_t inherited; // robust mutexes taken over from the dead
    uint64_t pace_us;
} exits;

static pthread_mutex_t *mutex_at(uint64_t i) {
    return (pthread_mutex_t *)((char *)exits.mutexes + i % exits.n_mutexes * PAGE);
}

static void *die_holding(void *argument) {
    uint64_t first = (uint64_t)argument;
    for (uint64_t i = 0; i < 3; i++) { // several entries on the robust list, on different pages
        int error = pthread_mutex_lock(mutex_at(first + i * 17));
        if (error != 0) {
            problem("lock before dying: error %d", error);
        }
    }
    return NULL;
}

static void *robust_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 0;; round++) {
        pthread_t thread;
        uint64_t first = round * 5;
        if (pthread_create(&thread, NULL, die_holding, (void *)first) != 0) {
            problem("pthread_create failed");
            return NULL;
        }
        for (uint64_t i = 0; i < 3; i++) {
            pthread_mutex_t *mutex = mutex_at(first + i * 17);
            int error;
            do { // free until the thread takes it, then held until it dies
                error = pthread_mutex_lock(mutex);
                if (error == 0) {
                    pthread_mutex_unlock(mutex);
                    pause_us(50);
                }
            } while (error == 0);
            if (error != EOWNERDEAD) {
                problem("robust lock: error %d", error);
                return NULL;
            }
            pthread_mutex_consistent(mutex);
            pthread_mutex_unlock(mutex);
            atomic_fetch_add(&exits.inherited, 1);
        }
        pthread_join(thread, NULL);
        atomic_fetch_add(&exits.joined, 1);
        pause_us(exits.pace_us);
    }
    return NULL;
}

static void *leaf(void *argument) { return argument; }

static void *join_churn(void *unused) {
    (void)unused;
    for (uint64_t round = 1;; round++) {
        pthread_t thread;
        void *result = NULL;
        if (pthread_create(&thread, NULL, leaf, (void *)round) != 0) {
            problem("pthread_create failed");
            return NULL;
        }
        pthread_join(thread, &result);
        if ((uint64_t)result != round) {
            problem("joined with %p", result);
        }
        atomic_fetch_add(&exits.joined, 1);
        pause_us(exits.pace_us);
    }
    return NULL;
}

static void answer(const char *command, char *out, size_t size) {
    (void)command;
    snprintf(out, size, "{\"problems\": %lu, \"first\": \"%s\", \"joined\": %lu, \"inherited\": %lu}",
             atomic_load(&problems.count), problems.first, atomic_load(&exits.joined), atomic_load(&exits.inherited));
}

int main(int argc, char **argv) {
    int listener = control_open(option(argc, argv, "--control", "/tmp/exits.control"));
    exits.pace_us = number(argc, argv, "--pace", 200);
    exits.n_mutexes = number(argc, argv, "--mutexes", 2048);
    exits.mutexes = mmap(NULL, exits.n_mutexes * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    for (uint64_t i = 0; i < exits.n_mutexes; i++) {
        pthread_mutex_init(mutex_at(i), &attributes);
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, robust_churn, NULL) || pthread_create(&thread, NULL, join_churn, NULL) ||
        pthread_create(&thread, NULL, join_churn, NULL)) {
        return 73;
    }
    ready();
    control_serve(listener, answer);
}
