/* The program whose start is measured: it says that it runs, in one byte, and ends. */
#include <unistd.h>

int main(void) { return write(1, "!", 1) == 1 ? 0 : 1; }
