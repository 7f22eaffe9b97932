// One kind of process state: made before the picture is taken, checked afterwards, by the process itself.
#ifndef STATES_H
#define STATES_H
#include "target.h"

#include <fcntl.h>

struct state {
    const char *name;
    void (*make)(void);
    void (*check)(void); // says what is wrong by wrong()
    int only_named;      // left out unless `--only` names it
    char wrong[300];
};

extern const char *states_directory; // where files may be made
extern struct state *current;

// What is wrong with the state that is being checked; the first word counts.
void wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define EXPECT(condition, ...)     \
    do {                           \
        if (!(condition)) {        \
            wrong("" __VA_ARGS__); \
            return;                \
        }                          \
    } while (0)

// Reads a whole small file of /proc into `out`; -1 where it cannot be read.
ssize_t slurp(const char *path, char *out, size_t size);

extern struct state memory_states[];
extern struct state descriptor_states[];
extern struct state thread_states[];
extern struct state process_states[];

#endif
