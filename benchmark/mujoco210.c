/* Steps of MuJoCo 2.1.0, the last version with D4RL's physics:   mujoco210 model.xml FRAME_SKIP < states > next

   A line of `states` has qpos, qvel and ctrl, a line of `next` qpos and qvel after FRAME_SKIP steps; a row of
   tests/mujoco_210.npz has both. model.xml is Gymnasium's, for AntMaze D4RL's ant.xml with ctrlrange 1, gear 30 and the
   walls as boxes. The library and its headers are in PyPI's free-mujoco-py 2.1.6, a zip file, under
   mujoco_py/binaries/linux/mujoco210 (M below):

   gcc -I M/include benchmark/mujoco210.c -o mujoco210 -L M/bin -lmujoco210nogl -Wl,-rpath,M/bin */
#include <stdio.h>
#include <stdlib.h>

#include "mujoco.h"

static int read(mjtNum* x, int n) {
  for (int i = 0; i < n; i++)
    if (scanf("%lf", &x[i]) != 1) return 0;
  return 1;
}

static void write(const mjtNum* x, int n) {
  for (int i = 0; i < n; i++) printf("%.17g ", x[i]);
}

int main(int argc, char** argv) {
  char error[1000] = "usage: mujoco210 model.xml FRAME_SKIP < states > next";
  mjModel* model = argc == 3 ? mj_loadXML(argv[1], NULL, error, sizeof error) : NULL;
  if (!model) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  mjData* data = mj_makeData(model);
  for (;;) {
    mj_resetData(model, data);
    if (!read(data->qpos, model->nq) || !read(data->qvel, model->nv) || !read(data->ctrl, model->nu)) return 0;
    for (int i = 0; i < atoi(argv[2]); i++) mj_step(model, data);
    write(data->qpos, model->nq);
    write(data->qvel, model->nv);
    printf("\n");
  }
}
